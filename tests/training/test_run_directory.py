# SPDX-License-Identifier: Apache-2.0
"""A run directory says whose it is, whatever happened to the process that said it, and belongs to one at a time."""

import fcntl
import logging
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_eve.checkpoint.manifest import Manifest, file_entry, write_manifest
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ConfigError
from megatron_eve.folder_lock import only_one
from megatron_eve.run_files import CONFIG
from megatron_eve.training import run_directory
from megatron_eve.training.run_directory import claimed

HOLD = """
import sys, time
from pathlib import Path
from megatron_eve.folder_lock import only_one
with only_one(Path(sys.argv[1]), what="run"):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def no_patience() -> Iterator[None]:
    with patch.object(run_directory, "_PATIENCE_S", 0.0):
        yield


def claim(run_dir: Path, recipe: str = "eve_tiny_stage3") -> None:
    with claimed(run_dir, load_recipe(recipe)):
        pass


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run with a checkpoint that was killed, or whose disk was full, before config.txt had its hash."""
    claim(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    return tmp_path / "run"


def test_another_run_is_refused_by_config_txt(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds the checkpoints of another run: recipe was"):
        claim(run_dir, "eve_tiny_stage1")
    claim(run_dir)


def test_another_loss_is_refused(run_dir: Path) -> None:
    """Also where the recipe's default has changed since; a configuration of before names no group."""
    path = run_dir / "config.txt"
    lines = [line for line in path.read_text().splitlines() if "loss_group_samples" not in line]
    path.write_text("\n".join(lines) + "\n")
    claim(run_dir)
    was = "optim.loss_normalization={} optim.loss_group_samples=none"
    for before, advice in (
        ("sqrt_tokens", "Add `{}` to go on as before, or choose"),
        ("microbatch_mean", "Choose"),
    ):
        path.write_text("\n".join(lines).replace("global_tokens", before) + "\n")
        with pytest.raises(ConfigError) as refusal:
            claim(run_dir)
        assert (
            f"a run with {was.format(before)}, this run has {was.format('global_tokens')}. "
            f"{advice.format(was.format(before))} another run_dir, "
        ) in str(refusal.value), "what is not offered any more is no advice"


def test_a_full_disk_leaves_the_configuration_as_it_was(run_dir: Path) -> None:
    """Cut short, it would be another run's, and the run could not go on when there is room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            claim(run_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run_dir / "config.txt").read_text() == config_text(load_recipe("eve_tiny_stage3"))
    claim(run_dir)


def test_a_flipped_bit_in_the_configuration_is_mended_from_a_checkpoint(run_dir: Path) -> None:
    """The newest checkpoint with a whole one says whose the run is."""
    good = config_text(load_recipe("eve_tiny_stage3"))
    for step in (4, 8):
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / CONFIG).write_text(good)
        files = {CONFIG: file_entry(checkpoint / CONFIG)}
        write_manifest(checkpoint, Manifest(facts={}, files=files))
    (checkpoint / CONFIG).write_text(good.replace("model.num_layers", "model.num_layerr"))
    (run_dir / CONFIG).write_bytes(
        good.encode().replace(b"model.num_layers: ", b"model.num_layers\xba ")
    )
    with pytest.raises(ConfigError, match="recipe was eve_tiny_stage3, is eve_tiny_stage1"):
        claim(run_dir, "eve_tiny_stage1")
    claim(run_dir)
    assert (run_dir / CONFIG).read_text() == good


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


def test_a_second_process_is_refused_until_the_first_is_dead(run_dir: Path) -> None:
    (run_dir / "config.txt").unlink()
    with held(run_dir) as holder:
        message = (
            rf"in use by another run: process {holder.pid} on \S+, since \d{{4}}-.*; wait for it"
        )
        for _ in range(2):  # the first refusal changes nothing
            with pytest.raises(ConfigError, match=message):
                claim(run_dir)
        assert not (run_dir / "config.txt").exists()
        holder.kill()
        holder.wait()
        claim(run_dir)
    assert (run_dir / "config.txt").exists()


def test_one_that_is_about_to_end_is_waited_for(run_dir: Path) -> None:
    with held(run_dir) as holder, patch.object(run_directory, "_PATIENCE_S", 60.0):
        waits = threading.Event()
        with patch.object(logging.Logger, "warning", lambda *_: waits.set()):
            second = threading.Thread(target=claim, args=(run_dir,), daemon=True)
            second.start()
            assert waits.wait(30)
        holder.kill()
        second.join(30)
        assert not second.is_alive()


def test_a_file_system_without_locks_is_told(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with patch.object(fcntl, "flock", side_effect=OSError(37, "No locks available")):
        claim(run_dir)
    (said,) = caplog.messages
    assert re.search(
        r"run cannot be locked \(.*No locks available\): start only one run there", said
    )


def test_a_file_system_that_calls_a_held_lock_forbidden(run_dir: Path) -> None:
    with (
        patch.object(fcntl, "flock", side_effect=PermissionError(13, "Permission denied")),
        pytest.raises(ConfigError, match="in use by another run: process"),
    ):
        claim(run_dir)


def test_a_child_keeps_what_it_inherits(tmp_path: Path) -> None:
    with only_one(tmp_path, what="demo") as lock:
        child = subprocess.Popen(["sleep", "1000"], pass_fds=[lock.fileno()])
    with (
        pytest.raises(ConfigError, match="in use by another demo"),
        only_one(tmp_path, what="demo"),
    ):
        pass
    child.kill()
    child.wait()
    with only_one(tmp_path, what="demo"):
        pass
