# SPDX-License-Identifier: Apache-2.0
"""One test for each thing that happens to checkpoints: it is noticed, named in one line, and gone around by itself."""

import errno
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_eve.checkpoint import manager as manager_module
from megatron_eve.checkpoint import writer
from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.manager import CheckpointManager, TrainingState
from megatron_eve.checkpoint.manifest import check_folder, read_manifest
from megatron_eve.checkpoint.weights import load_weights
from megatron_eve.checkpoint.writer import _ShardWriter
from megatron_eve.config.schema import ParallelConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import COMPLETE
from tests.support.gloo import WorkerError
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import build, build_all, run_config

MODEL = tiny_model(layers=2)
DP2 = layout(data=2, distributed_optimizer=True)


def assemble(parallel: ParallelConfig) -> TrainingState:
    config = run_config(MODEL, parallel)
    training, _ = build_all(config, weights=None)
    training.optimizer.step()  # of no gradient; makes the moments
    return training


def change(training: TrainingState) -> None:
    """Every weight and every moment, as a step would."""
    with torch.no_grad():
        for chunk in training.chunks:
            for param in chunk.parameters():
                param.add_(0.125)
        (optimizer,) = training.optimizer.chained_optimizers
        for moments in optimizer.optimizer.state.values():
            for tensor in moments.values():
                tensor.add_(0.25)


def save(parallel: ParallelConfig, run_dir: Path, steps: tuple[int, ...], **options: Any) -> None:
    """A checkpoint of other weights after each of these steps."""
    training = assemble(parallel)
    manager = CheckpointManager(run_dir, **{"keep_last": 9, "config_text": "", **options})
    for step in steps:
        change(training)
        manager.save(training, step=step, data={"step": step})
    manager.wait()


class Lines(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resume(parallel: ParallelConfig, run_dir: Path) -> tuple[int | None, list[str], bool]:
    """The step that a run goes on from, what it logs, and whether the weights are those of that step's manifest."""
    training, heard = assemble(parallel), Lines()
    logger = logging.getLogger(manager_module.__name__)
    logger.addHandler(heard)
    try:
        manager = CheckpointManager(run_dir, keep_last=9, config_text="")
        manager.newest()
        resumed = manager.resume(training)
    finally:
        logger.removeHandler(heard)
    if resumed is None:
        return None, heard.lines, True
    stored = read_manifest(resumed.path).tensors
    same = canonical_hashes(training.chunks, training.optimizer) == stored
    return resumed.data["step"], heard.lines, same


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def exchange_a_number(path: Path) -> None:
    """Still good JSON."""
    text = path.read_text()
    assert '"step": 3' in text
    path.write_text(text.replace('"step": 3', '"step": 7', 1))


def chosen(names: Iterable[str], *, rest: Container[str]) -> list[Any]:
    """`rest` runs with make test-kill only."""
    return [pytest.param(n, marks=[pytest.mark.kill] if n in rest else []) for n in names]


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated shard": ("__1_0.distcp", truncate, r"__1_0\.distcp: found \d+ bytes"),
    "truncated common.pt": ("common.pt", truncate, r"common\.pt: found \d+ bytes"),
    "flipped bit in a shard": ("__0_0.distcp", flip_a_bit, r"__0_0\.distcp: its bytes are not"),
    "flipped bit in the index": (".metadata", flip_a_bit, r"\.metadata: its bytes are not"),
    "flipped bit in common.pt": ("common.pt", flip_a_bit, r"common\.pt: its bytes are not"),
    "missing shard": ("__1_0.distcp", Path.unlink, r"__1_0\.distcp: found None bytes"),
    "missing manifest": (COMPLETE, Path.unlink, r"is not a complete checkpoint"),
    "truncated manifest": (COMPLETE, truncate, r"is not a complete checkpoint"),
    "another number in the manifest": (COMPLETE, exchange_a_number, r"was changed after"),
}
MORE_DAMAGES = (
    "truncated common.pt",
    "flipped bit in the index",
    "flipped bit in common.pt",
    "truncated manifest",
)


@pytest.fixture(scope="module")
def three(gloo2, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A run directory with checkpoints of steps 1, 2 and 3, written in the background by two processes."""
    run_dir = tmp_path_factory.mktemp("three")
    gloo2.run(save, DP2, run_dir, (1, 2, 3), async_save=True)
    return run_dir


@pytest.mark.parametrize("name", chosen(DAMAGES, rest=MORE_DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(gloo2, three, tmp_path, name):  # type: ignore[no-untyped-def]
    file, damage, message = DAMAGES[name]
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    damage(folder(run_dir, 3) / file)
    main, other = gloo2.run(resume, DP2, run_dir)
    assert (main[0], main[2]) == (other[0], other[2]) == (2, True)
    assert other[1] == []
    (said,) = (line for line in main[1] if "skipping a broken checkpoint" in line)
    assert re.search(message, said)
    assert "step_00000003" in said
    assert (run_dir / "latest_step").read_text() == "2\n"
    assert not folder(run_dir, 3).exists()
    assert folder(run_dir, 3).with_name("step_00000003.broken").is_dir()


def test_without_a_good_one_the_run_is_refused(gloo2, three, tmp_path):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    for step in (1, 2, 3):
        flip_a_bit(folder(run_dir, step) / "__0_0.distcp")
    for message in gloo2.run(refusal, DP2, run_dir):
        assert "no usable checkpoint" in message
        assert all(f"step_0000000{step}" in message for step in (1, 2, 3))
    assert folder(run_dir, 3).is_dir(), "nothing is set aside that a person may still mend"


def test_another_kind_of_optimizer_is_refused_by_name(gloo1, three):  # type: ignore[no-untyped-def]
    (message,) = gloo1.run(refusal, layout(), three)
    assert "was written with parallel.distributed_optimizer=true, this run has false" in message


def refusal(parallel: ParallelConfig, run_dir: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resume(parallel, run_dir)
    return str(caught.value)


@pytest.mark.parametrize("content", [b"1\n", b"99\n", b"\xb3\n", b"", None])
def test_a_stale_latest_step_is_corrected(gloo1, three, tmp_path, content):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    latest = run_dir / "latest_step"
    latest.unlink() if content is None else latest.write_bytes(content)
    ((step, _, same),) = gloo1.run(resume, layout(distributed_optimizer=True), run_dir)
    assert (step, same) == (3, True)
    assert latest.read_text() == "3\n"


def test_what_a_killed_run_left_is_removed(gloo1, three, tmp_path):  # type: ignore[no-untyped-def]
    """A half written checkpoint and a half removed one; neither has a step's name."""
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    os.rename(folder(run_dir, 1), run_dir / "checkpoints" / ".old-step_00000001-0")
    os.rename(folder(run_dir, 3), run_dir / "checkpoints" / ".tmp-step_00000003-0")
    ((step, _, same),) = gloo1.run(resume, layout(distributed_optimizer=True), run_dir)
    assert (step, same) == (2, True)
    assert names(run_dir) == {"step_00000002"}


def test_a_checkpoint_that_a_killed_run_had_moved_aside_is_back(gloo1, three, tmp_path):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    shutil.copytree(folder(run_dir, 2), run_dir / "checkpoints" / ".replaced-step_00000002")
    os.rename(folder(run_dir, 3), run_dir / "checkpoints" / ".replaced-step_00000003")
    ((step, _, same),) = gloo1.run(resume, layout(distributed_optimizer=True), run_dir)
    assert (step, same) == (3, True)
    assert not list((run_dir / "checkpoints").glob(".*"))


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 20_000

    def write(self, content: Any) -> int:
        if self.tell() + len(memoryview(content).cast("B")) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def no_room(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("none left")


def no_thread(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("can't start new thread")


def free_bytes(path: Path) -> Any:
    return SimpleNamespace(free=1 << 10)


# name: (whose fault, what is replaced, by what, what the error says)
FAULTS: dict[str, tuple[int, Any, str, Any, str]] = {
    "disk full in a shard": (1, writer, "open", FullDisk, r"__1_0\.distcp: No space left"),
    "disk full in rank 0's shard": (0, _ShardWriter, "_write_item", no_room, "No space left"),
    "disk full in common.pt": (0, writer.torch, "save", no_room, r"common\.pt: No space left"),
    "disk full in the index": (0, _ShardWriter, "finish", no_room, "No space left"),
    "disk full in the manifest": (0, writer, "write_manifest", no_room, "No space left"),
    "disk known to be too small": (0, writer.shutil, "disk_usage", free_bytes, "checkpoint needs"),
    "no permission to make a folder": (0, Path, "mkdir", forbidden, "Permission denied"),
    "no permission to rename": (0, os, "replace", forbidden, "Permission denied"),
    "no permission to publish": (0, CheckpointManager, "_publish", forbidden, "cannot publish"),
    "no memory for the copies": (1, writer, "_on_cpu", no_memory, r"rank 1's part: MemoryError"),
    "no thread": (
        0,
        writer.ThreadPoolExecutor,
        "submit",
        no_thread,
        "rank 0's part: .* new thread",
    ),
    "no memory": (1, _ShardWriter, "_write_item", no_memory, r"__1_0\.distcp: MemoryError: none"),
}
MORE_FAULTS = ("disk full in rank 0's shard", "disk full in the index", "no permission to rename")


def save_with_fault(run_dir: Path, name: str, async_save: bool) -> tuple[str, set[str], bool]:
    """The error, what it left, and whether the next save succeeds."""
    rank, owner, attribute, fault, _ = FAULTS[name]
    training = assemble(DP2)
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=async_save)
    change(training)
    is_here = torch.distributed.get_rank() == rank
    with patch.object(owner, attribute, fault, create=True) if is_here else nullcontext():
        message = refusal_to_save(manager, training)
    torch.distributed.barrier()
    left = names(run_dir)
    torch.distributed.barrier()
    manager.save(training, step=5, data={"step": 5})
    manager.wait()
    return message, left, check_folder(folder(run_dir, 5))["step"] == 5


def refusal_to_save(manager: CheckpointManager, training: TrainingState) -> str:
    try:
        manager.save(training, step=4, data={"step": 4})
        manager.wait()
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("name", chosen(FAULTS, rest=MORE_FAULTS))
def test_a_save_that_fails_says_why_on_every_rank_and_spoils_nothing(gloo2, three, tmp_path, name):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    before = names(run_dir)
    answers = gloo2.run(save_with_fault, run_dir, name, name not in FOREGROUND)
    assert len({message for message, _, _ in answers}) == 1
    for message, left, saved_again in answers:
        assert re.search(FAULTS[name][4], message), message
        assert "\n" not in message
        assert "Earlier checkpoints are as they were" in message
        assert left == before, "nothing half written, all steps still there"
        assert saved_again


FOREGROUND = ("disk full in rank 0's shard",)  # in the others training goes on


def test_the_last_and_every_nth_are_kept(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    steps = (1, 2, 3, 4, 5, 6, 7)
    keep = dict(keep_last=2, keep_every_steps=3)
    gloo1.run(save, layout(), tmp_path, steps, **keep, async_save=True)
    assert names(tmp_path) == {f"step_0000000{step}" for step in (3, 6, 7)}
    assert (tmp_path / "latest_step").read_text() == "7\n"


def drift(run_dir: Path) -> str:
    training = assemble(DP2)
    if torch.distributed.get_rank() == 1:
        change(training)
    with pytest.raises(CheckpointError) as caught:
        CheckpointManager(run_dir, keep_last=1, config_text="").save(training, step=1, data={})
    return str(caught.value)


def test_replicas_that_drifted_apart_are_not_saved(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    for message in gloo2.run(drift, tmp_path):
        assert "data-parallel replicas on ranks [0, 1] are not the same bits" in message


def weights_of(path: str) -> dict[str, Any]:
    chunks, *_ = build(run_config(MODEL, layout()), weights=None)
    load_weights(chunks, path, copy_text_to_vision=False)
    return canonical_hashes(chunks)


def test_the_next_stage_starts_from_weights_that_were_verified(gloo1, three, tmp_path):  # type: ignore[no-untyped-def]
    """From the checkpoint before if the run's newest is damaged; a damaged checkpoint that was named is refused."""
    run_dir = tmp_path / "run"
    shutil.copytree(three, run_dir)
    flip_a_bit(folder(run_dir, 3) / "__0_0.distcp")
    (loaded,) = gloo1.run(weights_of, str(run_dir))
    stored = read_manifest(folder(run_dir, 2)).tensors
    assert loaded == {n: h for n, h in stored.items() if not n.startswith("optimizer.")}
    with pytest.raises(WorkerError, match="its bytes are not those that were written"):
        gloo1.run(weights_of, str(folder(run_dir, 3)))


def test_a_folder_of_before_there_were_hashes_is_read(gloo1, three, tmp_path):  # type: ignore[no-untyped-def]
    """Sizes are what it has, and what is checked."""
    old = tmp_path / "old"
    shutil.copytree(folder(three, 3), old)
    files = {path.name: path.stat().st_size for path in old.iterdir() if path.name != COMPLETE}
    (old / COMPLETE).write_text(json.dumps({"kind": "weights", "files": files}))
    (loaded,) = gloo1.run(weights_of, str(old))
    assert loaded.items() <= read_manifest(folder(three, 3)).tensors.items()
    truncate(old / "__0_0.distcp")
    with pytest.raises(WorkerError, match=r"__0_0\.distcp: found"):
        gloo1.run(weights_of, str(old))
