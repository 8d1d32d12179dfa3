# SPDX-License-Identifier: Apache-2.0
"""Reading EVE/LLaVA annotation files one entry at a time, so that a file of any size needs little memory.

Three forms come in, each also packed by gzip: a JSON list of samples; a JSON list of strings, each the path of a JSON
file with one sample (the official code's index); JSON lines. The content decides which it is, not the name.
Entries come out as `RawEntry` in the order of the file. A list that is not JSON is refused as a whole (DataError with
the position), and so is every other format, by its name (formats.py); a bad line of JSON lines is one bad entry, and so
is an object that has a key twice, of which json would take the last.

Source: EVE's train.py, LazySupervisedDataset.__init__, for the two meanings of a JSON list.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_eve.errors import DataError

from .formats import GZIP_MAGIC, refusal_of_file, refusal_of_path

CHUNK_CHARACTERS = 1 << 20
MAX_ENTRY_CHARACTERS = 1 << 26
"""An entry that is not complete after this many characters counts as broken JSON."""


@dataclass(frozen=True, slots=True)
class RawEntry:
    """One entry of the input before any check: a parsed value (a dict if all is well, a str in an index), or the reason
    why the line could not be parsed."""

    index: int
    value: object
    error: str | None = None
    is_duplicate: bool = False  # the error is a key that an object has twice


class DuplicateKeyError(ValueError):
    """An object has a key twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSummary:
    """What identifies an input: its hash, and how many entries it has."""

    sha256: str
    num_entries: int


def parse_json(text: str) -> object:
    """`json.loads`, but a key that an object has twice raises DuplicateKeyError."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise DuplicateKeyError(
            f"an object has the key `{twice}` twice; keep the one that is meant"
        )
    return value


def scan_input(path: Path) -> InputSummary:
    """Hash the whole file and count its entries; finds broken JSON before any work is done."""
    refuse_no_file(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputSummary(sha256=digest, num_entries=sum(1 for _ in iterate_entries(path)))


def refuse_no_file(path: Path) -> None:
    """Raises: DataError that says what is there instead."""
    if not path.is_file():
        raise refusal_of_path(path)


def iterate_entries(path: Path) -> Iterator[RawEntry]:
    """All entries of a JSON list or of JSON lines, in order."""
    try:
        with open_text(path) as file:
            are_lines = _holds_lines(path)
            yield from _lines(file) if are_lines else _list_items(file, path=path)
    except UnicodeDecodeError as error:
        raise refusal_of_file(path, problem=f"is not UTF-8 text ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file ({error}); copy or pack it again."
        ) from error


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """The text of a file, unpacked if it is a gzip."""
    with path.open("rb") as file:
        is_packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        file.seek(0)
        binary: IO[bytes] = gzip.GzipFile(fileobj=file) if is_packed else file  # type: ignore[assignment]
        with io.TextIOWrapper(binary, encoding="utf-8-sig") as text:
            yield text


def _holds_lines(path: Path) -> bool:
    """Whether a file holds JSON lines: by its first letter, and for objects by its second line or its name."""
    with open_text(path) as file:
        first = ""
        while not first.strip():
            first = file.readline(CHUNK_CHARACTERS)
            if not first:
                break
        named = path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))
        if first.lstrip().startswith("["):
            return False
        if named:
            return bool(first)
        following = file.readline(CHUNK_CHARACTERS).lstrip()
        return first.lstrip().startswith("{") and following.startswith("{") and _is_json(first)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(file: IO[str]) -> Iterator[RawEntry]:
    index = 0
    for line in file:
        if not line.strip():
            continue
        try:
            yield RawEntry(index, parse_json(line))
        except json.JSONDecodeError as error:
            yield RawEntry(index, None, f"{error.msg} at column {error.colno}")
        except DuplicateKeyError as error:
            yield RawEntry(index, None, str(error), is_duplicate=True)
        except RecursionError:
            yield RawEntry(index, None, "nested too deeply")
        index += 1


def _list_items(file: IO[str], *, path: Path) -> Iterator[RawEntry]:
    """Decode the elements of a JSON list from a window that moves over the file."""
    window = _Window(file, path=path)
    if window.next_character() != "[":
        raise refusal_of_file(path, problem="does not hold a JSON list")
    window.position += 1
    index = 0
    if window.next_character() == "]":
        window.position += 1
    else:
        while True:
            value = window.next_value()
            twice, window.twice = window.twice, None
            yield RawEntry(index, None, twice, True) if twice else RawEntry(index, value)
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
        self.twice: str | None = None  # what an object of the last value has twice
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """As `_object`, but the value is read to its end, so that the next can be found."""
        try:
            return _object(pairs)
        except DuplicateKeyError as error:
            self.twice = str(error)
            return dict(pairs)

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
