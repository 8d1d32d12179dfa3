# SPDX-License-Identifier: Apache-2.0
"""A read that fails is tried again, boundedly; a file that never answers costs the wait once."""

import errno
import logging
from pathlib import Path

import pytest

from megatron_eve.data.read import reading
from megatron_eve.data.read.reading import Patience, settled

FILE = Path("shard.mds")


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(errno.EIO, "Input/output error")
        return "bytes"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept."""
    slept: list[float] = []
    monkeypatch.setattr(reading.time, "sleep", slept.append)
    return slept


def test_a_read_that_fails_for_a_while_succeeds(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    patience, read = Patience((0.1, 0.5, 2.0)), Flaky(3)
    with caplog.at_level(logging.WARNING):
        assert patience.read(FILE, read) == "bytes"
    assert pauses == [0.1, 0.5, 2.0]
    assert patience.num_retries == 3
    assert caplog.text.count("a read failed") == 1
    assert "shard.mds" in caplog.text


def test_a_file_that_never_answers_costs_the_wait_once(pauses: list[float]) -> None:
    patience, read = Patience((0.1, 0.5)), Flaky(99)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            patience.read(FILE, read)
    assert read.calls == 3 + 1 + 1
    assert pauses == [0.1, 0.5]
    assert patience.read(Path("other.mds"), Flaky(1)) == "bytes"


def test_pauses_grow_and_are_bounded() -> None:
    assert list(reading.PAUSES_S) == sorted(reading.PAUSES_S)
    assert sum(reading.PAUSES_S) < 15


def test_all_items_wait_together(pauses: list[float]) -> None:
    asked: list[int] = []

    def problem_of(item: int) -> str | None:
        asked.append(item)
        return f"bad {item}" if item % 2 and asked.count(item) < item else None

    assert settled(range(6), problem_of, pauses_s=(1.0, 2.0)) == {5: "bad 5"}
    assert pauses == [1.0, 2.0]
