# SPDX-License-Identifier: Apache-2.0
"""Reading EVE/LLaVA annotation files one entry at a time, so that a file of any size needs little memory.

Three forms come in: a JSON list of samples; a JSON list of strings, each the path of a JSON file with one sample (the
official code's index); JSON lines. Entries come out as `RawEntry` in the order of the file. A list that is not JSON is
refused as a whole (DataError with the position); a bad line of a .jsonl file is one bad entry.

Source: EVE's train.py, LazySupervisedDataset.__init__, for the two meanings of a JSON list.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_eve.errors import DataError

CHUNK_CHARACTERS = 1 << 20
MAX_ENTRY_CHARACTERS = 1 << 26
"""An entry that is not complete after this many characters is taken for broken JSON."""


@dataclass(frozen=True, slots=True)
class RawEntry:
    """One entry of the input before any check: a parsed value (a dict if all is well, a str in an index), or the reason
    why the line could not be parsed."""

    index: int
    value: object
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSummary:
    """What identifies an input: its hash, and how many entries it has."""

    sha256: str
    num_entries: int


def scan_input(path: Path) -> InputSummary:
    """Hash the whole file and count its entries; finds broken JSON before any work is done."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the JSON file with the samples.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputSummary(sha256=digest, num_entries=sum(1 for _ in iterate_entries(path)))


def iterate_entries(path: Path) -> Iterator[RawEntry]:
    """All entries of a .json list or a .jsonl file, in order."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _lines(file) if path.suffix == ".jsonl" else _list_items(file, path=path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); convert it to UTF-8.") from error


def _lines(file: IO[str]) -> Iterator[RawEntry]:
    index = 0
    for line in file:
        if not line.strip():
            continue
        try:
            yield RawEntry(index, json.loads(line))
        except json.JSONDecodeError as error:
            yield RawEntry(index, None, f"{error.msg} at column {error.colno}")
        except RecursionError:
            yield RawEntry(index, None, "nested too deeply")
        index += 1


def _list_items(file: IO[str], *, path: Path) -> Iterator[RawEntry]:
    """Decode the elements of a JSON list from a window that moves over the file."""
    window = _Window(file, path=path)
    if window.next_character() != "[":
        raise DataError(
            f"{path} does not hold a JSON list; expected [{{...}}, ...] with one object or path per "
            "sample, or a .jsonl file with one object per line."
        )
    window.position += 1
    index = 0
    if window.next_character() == "]":
        window.position += 1
    else:
        while True:
            yield RawEntry(index, window.next_value())
            index += 1
            separator = window.next_character()
            window.position += 1
            if separator == "]":
                break
            if separator != ",":
                raise window.broken(f"expected ',' or ']' after entry {index - 1}")
    if window.next_character():
        raise window.broken("there is text after the end of the list")


class _Window:
    """A piece of the file's text, refilled as values are taken from its front."""

    def __init__(self, file: IO[str], *, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.position = "", 0
        self.dropped = 0  # characters of the file before `text`
        self.decoder = json.JSONDecoder()

    def broken(self, problem: str) -> DataError:
        return DataError(
            f"{self.path} is not valid JSON near character {self.dropped + self.position:,}: {problem}; "
            "repair the file or write it anew."
        )

    def refill(self, characters: int) -> bool:
        """Append text, dropping what was used. Returns False at the end of the file."""
        more = self.file.read(characters)
        self.dropped += self.position
        self.text, self.position = self.text[self.position :] + more, 0
        return bool(more)

    def next_character(self) -> str:
        """The next character that is not white space, without taking it; empty at the end of the file."""
        while True:
            while self.position < len(self.text):
                if not self.text[self.position].isspace():
                    return self.text[self.position]
                self.position += 1
            if not self.refill(CHUNK_CHARACTERS):
                return ""

    def _is_complete(self, value: object, *, end: int) -> bool:
        """Whether the value cannot go on behind position `end`; a number goes on until something else follows."""
        following = self.text[end : end + 1]
        return (
            following in (",", "]", " ", "\n", "\r", "\t")
            if isinstance(value, int | float)
            else following != ""
        )

    def next_value(self) -> object:
        """Take one JSON value. A value that touches the end of the window may go on after it, so more is read."""
        self.next_character()
        amount = CHUNK_CHARACTERS
        while True:
            problem = "the value is not complete"
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if self._is_complete(value, end=end):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                problem = error.msg
            except RecursionError as error:
                raise self.broken("nested too deeply") from error
            if len(self.text) - self.position > MAX_ENTRY_CHARACTERS or not self.refill(amount):
                raise self.broken(problem)
            amount *= 2
