# SPDX-License-Identifier: Apache-2.0
"""Reading from file systems that fail now and then: a read that the system refuses is tried again, with growing pauses.

Comes in: a function that reads from a file. Goes out: what it returns, or its last OSError after four more tries in
about ten seconds. A file that has used up this patience gets a single try from then on, so that a shard of thousands of
rows costs the wait once. Every repeated try is counted, and the first of each file is logged.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

PAUSES_S = (0.1, 0.5, 2.0, 8.0)
"""Before each further try. A parallel file system that fails over either blocks, or is back by then."""


class ShortRead(OSError):
    """The file ends too early: it was truncated, or is not copied yet."""


class Patience:
    """Tries reads again. Shared by the threads of a process."""

    def __init__(self, pauses_s: Sequence[float] | None = None) -> None:
        """`pauses_s`: before each further try; None: PAUSES_S."""
        self.pauses_s = PAUSES_S if pauses_s is None else tuple(pauses_s)
        self._given_up: set[Path] = set()
        self._warned: set[Path] = set()
        self._lock = threading.Lock()
        self.num_retries = 0  # of all files so far

    def read(self, path: Path, read: Callable[[], T]) -> T:
        """What `read` returns. Raises the OSError of its last try."""
        for pause in () if path in self._given_up else self.pauses_s:
            try:
                return read()
            except OSError as error:
                self._note(path, error)
                time.sleep(pause)
        try:
            return read()
        except OSError:
            self.give_up(path)
            raise

    def give_up(self, path: Path) -> None:
        """From now on reads of a file are tried once."""
        with self._lock:
            self._given_up.add(path)

    def _note(self, path: Path, error: OSError) -> None:
        with self._lock:
            self.num_retries += 1
            is_first = path not in self._warned
            self._warned.add(path)
        if is_first:
            _LOG.warning("%s: a read failed (%s) and is tried again", path, error)


def settled(
    items: Sequence[T], problem_of: Callable[[T], str | None], *, pauses_s: Sequence[float]
) -> dict[int, str]:
    """Position -> problem of the items that still have one after all pauses; all wait together."""
    problems = {i: problem for i, item in enumerate(items) if (problem := problem_of(item))}
    for pause in pauses_s:
        if not problems:
            break
        time.sleep(pause)
        problems = {i: problem for i in problems if (problem := problem_of(items[i]))}
    return problems
