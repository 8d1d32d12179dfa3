# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is written while training goes on."""

import gc
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_eve.checkpoint import manager as manager_module
from megatron_eve.checkpoint import writer
from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.checkpoint.manifest import check_folder, read_manifest
from megatron_eve.checkpoint.training_state import TrainingState, saved_state
from megatron_eve.checkpoint.writer import _ShardWriter
from tests.checkpoint.test_faults import DP2, assemble, change, folder, names, save
from tests.support.tiny import layout

THREAD = "checkpoint-writer"


def save_slowly(run_dir: Path) -> tuple[bool, bool, bool]:
    """Whether save() returned before the checkpoint was there, poll() did not wait, and the old weights were saved."""
    training = assemble(DP2)
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=True)
    write = _ShardWriter.write

    def slowly(self: _ShardWriter) -> Any:
        while not (run_dir / "go on").exists():
            time.sleep(0.01)
        return write(self)

    before = canonical_hashes(training.chunks, training.optimizer)
    with patch.object(_ShardWriter, "write", slowly):
        path = manager.save(training, step=1, data={})
    change(training)
    early = manager.poll() is None and not path.exists()
    torch.distributed.barrier()
    (run_dir / "go on").touch()
    published = manager.wait()
    stored = read_manifest(path).tensors
    changed = canonical_hashes(training.chunks, training.optimizer)
    resumed = CheckpointManager(run_dir, keep_last=9, config_text="").resume(training)
    loaded = canonical_hashes(training.chunks, training.optimizer)
    return early, published == path, resumed is not None and loaded == stored == before != changed


def test_training_goes_on_while_a_checkpoint_is_written(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    assert gloo2.run(save_slowly, tmp_path) == [(True, True, True)] * 2


def save_without_fork(run_dir: Path) -> bool:
    with patch.object(os, "fork", side_effect=AssertionError("fork")):
        save(DP2, run_dir, (1,), async_save=True)
    return check_folder(folder(run_dir, 1))["step"] == 1


def test_no_process_is_forked(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    """os.fork() itself may never return in the child: CPython 3.11 takes a lock there (HEAD_LOCK in
    _PyThreadState_DeleteExcept) that a thread of gloo's or autograd's, on its way in or out, held at the fork."""
    assert gloo2.run(save_without_fork, tmp_path) == [True] * 2


def save_and_give_up(run_dir: Path) -> tuple[list[Any], set[str], bool]:
    """What is written after close(), what is left, and whether the next save succeeds."""
    training = assemble(DP2)
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=True)
    write_item, begun, written = _ShardWriter._write_item, threading.Event(), []

    def late(self: _ShardWriter, *args: Any) -> Any:
        if not begun.is_set():
            begun.set()
            self.stopped.wait(30)
        result = write_item(self, *args)
        written.append(result)
        return result

    with patch.object(_ShardWriter, "_write_item", late):
        manager.save(training, step=1, data={})
        begun.wait()
        if torch.distributed.get_rank() == 1:
            manager.close()
        torch.distributed.barrier()  # a folder in which others still write is removed at the next start
        manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]
    torch.distributed.barrier()
    left = names(run_dir)
    torch.distributed.barrier()
    manager.save(training, step=2, data={})
    manager.wait()
    return written, left, check_folder(folder(run_dir, 2))["step"] == 2


def test_one_that_is_given_up_ends_at_once_and_leaves_nothing(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    """A run that fails does not stay until its checkpoint is written."""
    assert gloo2.run(save_and_give_up, tmp_path) == [([], set(), True)] * 2


def save_on_a_disk_that_hangs(run_dir: Path) -> bool:
    """Whether close() comes back before the disk does."""
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=True)
    write_item, answers, is_back = _ShardWriter._write_item, threading.Event(), []

    def late(self: _ShardWriter, *args: Any) -> Any:
        answers.wait(30)
        is_back.append(True)
        return write_item(self, *args)

    with patch.object(_ShardWriter, "_write_item", late), patch.object(writer, "_STOP_S", 0.1):
        manager.save(assemble(layout()), step=1, data={})
        manager.close()
        was_early = not is_back
        answers.set()
    return was_early


def test_a_disk_that_hangs_does_not_keep_a_run_that_failed(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    assert gloo1.run(save_on_a_disk_that_hangs, tmp_path) == [True]


def save_and_interrupt(run_dir: Path) -> tuple[list[Any], set[str]]:
    """What is written after an interrupt of wait(), and what is left."""
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=True)
    write_item, written = _ShardWriter._write_item, []

    def late(self: _ShardWriter, *args: Any) -> Any:
        self.stopped.wait(30)
        written.append(write_item(self, *args))
        return written[-1]

    with patch.object(_ShardWriter, "_write_item", late):
        manager.save(assemble(layout()), step=1, data={})
        with (
            patch.object(writer.time, "sleep", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            manager.wait()
        manager.close()
    return written, names(run_dir)


def test_an_interrupt_stops_the_writing(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    """The interpreter waits for its threads as it ends."""
    assert gloo1.run(save_and_interrupt, tmp_path) == [([], set())]


def save_and_look(run_dir: Path) -> set[str]:
    """What is still held of a state dict while its copies are written."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    manager = CheckpointManager(run_dir, keep_last=9, config_text="", async_save=True)
    write, go_on, parts = _ShardWriter.write, threading.Event(), weakref.WeakValueDictionary()

    def slowly(self: _ShardWriter) -> Any:
        go_on.wait(30)
        return write(self)

    def seen(training: TrainingState) -> dict[str, Any]:
        state = saved_state(training)
        for part in nested_values(state["optimizer"]):
            if isinstance(part, ShardedTensor):
                parts[part.key] = part
        return state

    training = assemble(DP2)
    with (
        patch.object(_ShardWriter, "write", slowly),
        patch.object(manager_module, "saved_state", seen),
    ):
        manager.save(training, step=1, data={})
    gc.collect()
    held = set(parts)
    go_on.set()
    manager.wait()
    return held


def test_the_gathered_optimizer_is_given_back_before_writing(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    """With the distributed optimizer every rank gathers all its moments in host memory for a save."""
    assert gloo2.run(save_and_look, tmp_path) == [set()] * 2


@pytest.mark.kill
def test_hundreds_in_a_row(gloo2, tmp_path):  # type: ignore[no-untyped-def]
    gloo2.run(save, DP2, tmp_path, tuple(range(300)), async_save=True, keep_last=1)
    assert names(tmp_path) == {"step_00000299"}
