# SPDX-License-Identifier: Apache-2.0
"""Single samples that cannot be trained on: why, how many, and the report. A bad sample never stops
a run and is never dropped in silence: whoever finds it raises `SampleError`, whoever loops over
samples turns that into a line of quarantine.jsonl (`{"id", "source", "reason", "message", "file",
"row"}`) and a count. A run's quarantine.jsonl holds each row once, however often the run starts and
its epochs pass, and whichever process meets the row.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_eve.errors import DataError

Reason = Literal[
    "image_without_mark",  # the sample has an image, no turn has the mark <image>
    "fewer_marks_than_images",
    "more_marks_than_images",
    "mark_in_answer",  # <image> in a turn of the model
    "mark_in_system",  # <image> in the system text
    "unread_mark",  # a text holds a mark of unread media: <video>, <image_1>
    "unknown_role",  # neither human nor gpt, nor system
    "turns_not_alternating",
    "unanswered_turn",  # the conversation ends with a human turn
    "no_answer",  # no turn of the model at all
    "not_two_turns",  # template plain takes one human turn and one caption
    "empty_question",  # template qwen2: a question without any text
    "empty_answer",
    "special_text",  # text that spells a token that ends or pads a text
    "cut_image",  # max_text_tokens would cut before an image
    "cut_labels",  # max_text_tokens would leave nothing to learn from
    "bad_image_size",  # no pixels
    "aspect_ratio",
    "too_many_pixels",
    "size_mismatch",  # the file's header and the shard's row disagree
    "undecodable",
    "too_long",  # more tokens than a pack holds
    "unreadable_file",  # the system does not give the row's bytes: no file, cut, no permission, I/O error
    "damaged_row",  # the row's bytes are no row
    "changed_row",  # the row is not the one whose tokens were counted
]
REASONS: tuple[Reason, ...] = get_args(Reason)
UNREADABLE: frozenset[Reason] = frozenset({"unreadable_file", "damaged_row", "changed_row"})
"""Reasons that lie in files, not in what was written to them; data.max_unreadable bounds them."""

_LOG = logging.getLogger(__name__)


class SampleError(DataError):
    """One sample cannot be used. `reason` is the code that reports and counters group by."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One line of quarantine.jsonl."""

    id: str
    source: str
    reason: Reason
    message: str
    file: str  # the shard
    row: int  # in the shard, from 0

    @property
    def key(self) -> tuple[str, int]:
        return self.file, self.row


class QuarantineReport:
    """A quarantine.jsonl to which several processes may append. If the disk refuses, the run goes on and tries again
    with the next entries."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: set[tuple[str, int]] = set()
        self._read_until = 0  # bytes of the file that `_known` comes from
        self._waiting: dict[tuple[str, int], Quarantined] = {}
        self._lock = threading.Lock()

    def missing(self, entries: Iterable[Quarantined]) -> list[Quarantined]:
        """The entries that are not in the file yet."""
        with self._lock, suppress(OSError):
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                self._read(descriptor)
            finally:
                os.close(descriptor)
        return [entry for entry in entries if entry.key not in self._known]

    def add(self, entries: Sequence[Quarantined]) -> None:
        """Append the entries whose row is not in the file."""
        with self._lock:
            self._waiting |= {entry.key: entry for entry in entries if entry.key not in self._known}
            if not self._waiting:
                return
            try:
                self._append()
            except OSError as error:
                _LOG.warning("%s: cannot be written (%s); the run goes on", self._path, error)

    def _append(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with suppress(OSError):  # file systems without locks: at worst a row is there twice
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_torn = self._read(descriptor)
            new = [entry for key, entry in self._waiting.items() if key not in self._known]
            lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in new)
            data = (("\n" if is_torn and lines else "") + lines).encode("utf-8", "replace")
            while data:
                data = data[os.write(descriptor, data) :]
            self._known |= self._waiting.keys()
            self._waiting.clear()
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int) -> bool:
        """Note the lines that other processes or earlier starts wrote; returns whether the last is torn."""
        size = os.fstat(descriptor).st_size
        if size < self._read_until:  # it was emptied
            self._known, self._read_until = set(), 0
        data = b""
        while more := os.pread(descriptor, 1 << 20, self._read_until + len(data)):
            data += more
        whole, _, torn = data.rpartition(b"\n")
        for line in whole.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # of another version, or torn
                entry = json.loads(line)
                self._known.add((entry["file"], entry["row"]))
        self._read_until += len(data) - len(torn)
        return bool(torn)
