# SPDX-License-Identifier: Apache-2.0
"""From token ids, one by one, to pieces of text that can be shown at once.

A piece never ends inside a character of several bytes, inside a text that may yet become a stop text, or in white space
that may yet be the answer's last. All pieces together are the decoded answer, cut at the first stop text and stripped,
as `EVEProcessor.answers` gives it.
"""

from megatron_eve.data.read.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""Bytes that are no character decode to this, such as the first bytes of an unfinished one."""
_WINDOW = 48
"""With each new token the last ones are decoded again: at most twice as many, then the window moves on."""


class TextStream:
    """The text of one answer. `stopped` becomes true when a stop text was found."""

    def __init__(self, tokenizer: Tokenizer, *, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        # Where the window may begin next: the tokens up to here are whole characters.
        self._clean = 0
        self._read = 0  # characters of the window's text that are in _pending or shown
        self._pending = ""  # decoded, not shown
        self._has_begun = False
        self.stopped = False

    def push(self, token: int) -> str:
        """The piece that this token completes; often empty."""
        self._ids.append(token)
        text = self._decode()
        whole = text.rstrip(_REPLACEMENT)
        self._pending += whole[self._read :]
        self._read = max(self._read, len(whole))
        if whole == text:
            self._move_window()
        return self._release(is_last=False)

    def finish(self) -> str:
        """The last piece: what was held back, without white space at the end."""
        if not self.stopped:
            self._pending += self._decode()[self._read :]
        return self._release(is_last=True)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._start :], skip_special=True)

    def _move_window(self) -> None:
        # What stays in the window starts at a whole character; all of the window's text has been read.
        length = len(self._ids) - self._start
        if length <= _WINDOW:
            self._clean = len(self._ids)
        elif length > 2 * _WINDOW and self._clean > self._start:
            self._start, self._clean = self._clean, len(self._ids)
            self._read = len(self._decode())

    def _release(self, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        found = [at for text in self._stop if (at := self._pending.find(text)) >= 0]
        if found:
            self._pending, self.stopped, is_last = self._pending[: min(found)], True, True
        end = len(self._pending)
        if not is_last:
            end -= max((_overlap(self._pending, text) for text in self._stop), default=0)
        piece = self._pending[:end].rstrip()
        self._pending = self._pending[len(piece) :]
        if not self._has_begun:
            piece = piece.lstrip()
            self._has_begun = piece != ""
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
