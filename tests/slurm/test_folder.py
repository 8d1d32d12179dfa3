# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder as crashes and full disks leave them, and what is counted from them."""

import errno
import os
from pathlib import Path

import pytest

from slurm.folder import RunFolder
from slurm.outcome import End
from tests.slurm.conftest import make_job

TORN = (b"", b"\n", b"12\x00", b"\x00\x00\x00", b"1e3", b"-4", b"\xff\xfe", b"step")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "launcher").mkdir()
    return RunFolder(path=tmp_path)


def fail(folder: RunFolder, restart: int, end: End | None = End.RANK, *, job: str = "7") -> None:
    """One start and how it ended."""
    folder.record_start(make_job(job, restart=restart), commit="c")
    if end is not None:
        folder.record_end(make_job(job, restart=restart), end=end, code=1, why="")


def failures(folder: RunFolder, restart: int, *, job: str = "7") -> int:
    return folder.failures_without_progress(make_job(job, restart=restart))


@pytest.mark.parametrize("torn", TORN)
def test_half_written_numbers_count_as_not_written(folder: RunFolder, torn: bytes) -> None:
    (folder.path / "latest_step").write_bytes(torn)
    (folder.path / "DONE").write_bytes(torn)
    assert folder.step == 0
    assert folder.done_step is None
    (folder.path / "checkpoints/step_00000040").mkdir(parents=True)
    (folder.path / "checkpoints/step_00000040.partial").mkdir()
    assert folder.step == 40


@pytest.mark.parametrize(
    "torn", [b'{"job": "7", "restart": 1, "st', b"\x00\x00", b"[1]", b'{"job": "7"}', b"\xff"]
)
def test_half_a_line_of_starts_is_left_alone(folder: RunFolder, torn: bytes) -> None:
    fail(folder, 0)
    with (folder.path / "launcher/starts.jsonl").open("ab") as file:
        file.write(torn)
    fail(folder, 1)
    assert failures(folder, 1) == 2


def test_only_a_ranks_own_failure_without_progress_counts(folder: RunFolder) -> None:
    for restart, end in enumerate((None, End.STOPPED, End.NODE, End.OUTSIDE, End.SLURM)):
        fail(folder, restart, end)
    assert failures(folder, 4) == 0
    fail(folder, 5, End.RANK)
    fail(folder, 6, None)
    fail(folder, 7, End.HANG)
    assert failures(folder, 7) == 2
    (folder.path / "latest_step").write_text("3")
    assert failures(folder, 7) == 0


def test_starts_belong_to_a_job(folder: RunFolder) -> None:
    fail(folder, 0)
    fail(folder, 1)
    assert failures(folder, 0, job="8") == 0
    fail(folder, 0)  # the same number, of a cluster that was set up anew
    assert failures(folder, 0) == 1


def test_requeues_at_the_time_limit_or_from_outside_use_up_nothing(folder: RunFolder) -> None:
    for restart, end in enumerate((End.STOPPED, None, End.RANK, End.OUTSIDE, End.NODE)):
        fail(folder, restart, end)
    fail(folder, 5, None)
    assert folder.requeues_by_trouble(make_job("7", restart=5)) == 2


def test_a_full_disk_ends_no_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A STOP that is empty for want of space would count as a person's wish."""

    def full(_number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    folder.write_stop(make_job("7"))
    assert list(folder.path.glob("*STOP*")) == []
    assert "the ranks get the signal only" in caplog.text
    (folder.path / "launcher/starts.jsonl").mkdir()
    folder.record_start(make_job("7"), commit="c")
    assert "this start will not be counted" in caplog.text


@pytest.mark.parametrize(
    ("text", "persons"), [("requeue 7", False), ("req", False), ("", True), ("stop", True)]
)
def test_whose_stop_it_is(folder: RunFolder, text: str, persons: bool) -> None:
    (folder.path / "STOP").write_text(text)
    assert folder.stopped_by_person is persons


def test_a_persons_stop_is_not_the_launchers(folder: RunFolder) -> None:
    folder.write_stop(make_job("7"))
    assert not folder.stopped_by_person
    folder.clear_own_stop()
    assert not (folder.path / "STOP").exists()
    (folder.path / "STOP").touch()
    folder.write_stop(make_job("7"))
    folder.clear_own_stop()
    assert folder.stopped_by_person
