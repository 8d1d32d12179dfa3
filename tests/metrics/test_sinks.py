# SPDX-License-Identifier: Apache-2.0
"""Sinks: what is written, what a kill or a resume leaves, and the optional ones."""

import builtins
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.sinks import JsonlSink, Sinks, read_metrics
from megatron_eve.run_files import METRICS_FILE

CONFIG = load_recipe("eve_tiny_stage1")


def open_sinks(
    run_dir: Path, *overrides: str, start_step: int = 0, config: RunConfig = CONFIG
) -> Sinks:
    return Sinks.open(
        apply_overrides(config, overrides),
        run_dir=run_dir,
        start_step=start_step,
        total_steps=100,
        is_writer=True,
    )


def steps(path: Path) -> list[float | None]:
    return [record["step"] for record in read_metrics(path)]


def test_a_step_goes_to_console_and_jsonl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = time.time()
    with caplog.at_level(logging.INFO):
        sinks = open_sinks(tmp_path / "new")
        sinks.log(3, {"loss": 1.25, "samples": 64})
        sinks.close()
    assert caplog.messages == ["step 3/100 | loss 1.2500"]
    (record,) = read_metrics(tmp_path / "new" / METRICS_FILE)
    assert before - 1 < (record.pop("time") or 0) < time.time() + 1
    assert record == {"step": 3, "loss": 1.25, "samples": 64}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [METRICS_FILE]


def test_only_the_writer_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        sinks = Sinks.open(CONFIG, run_dir=run_dir, start_step=0, total_steps=1, is_writer=False)
        sinks.log(1, {"loss": 1.0})
        sinks.close()
    assert not run_dir.exists()
    assert not caplog.messages


def test_undeclared_metric_is_refused(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path)
    with pytest.raises(AssertionError, match=r"\['los'\] are not declared"):
        sinks.log(1, {"los": 1.0})
    sinks.close()


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path)
    sinks.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
    sinks.close()
    line = (tmp_path / METRICS_FILE).read_text()
    assert "NaN" not in line
    assert read_metrics(tmp_path / METRICS_FILE)[0]["loss"] is None
    assert json.loads(line)["lr"] == 1e-4


def test_resume_drops_the_steps_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    sinks = open_sinks(tmp_path)
    for step in range(1, 8):
        sinks.log(step, {"loss": float(step)})
    sinks.close()
    first = path.read_text()
    sinks = open_sinks(tmp_path, start_step=4)
    assert steps(path) == [1, 2, 3, 4]
    sinks.log(5, {"loss": 50.0})
    sinks.close()
    assert steps(path) == [1, 2, 3, 4, 5]
    assert path.read_text().startswith(first[: first.index('{"step": 5')])
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_at_the_last_step_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    sinks = open_sinks(tmp_path)
    sinks.log(1, {"loss": 1.0})
    sinks.close()
    inode = path.stat().st_ino
    open_sinks(tmp_path, start_step=1).close()
    assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', "\x00\x00\x00", '{"step": 3}garbage', "3", "null"]
)
def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert steps(path) == [1, 2]
    sinks = open_sinks(tmp_path, start_step=9)
    sinks.log(10, {"loss": 1.0})
    sinks.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 10]


def test_kill_9_loses_no_record(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; "
        "from megatron_eve.metrics.sinks import JsonlSink; "
        "sink = JsonlSink(Path(sys.argv[1]), start_step=0); "
        "[sink.log(step, {'loss': 1.0}) for step in range(1, 6)]; "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / METRICS_FILE
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert steps(path) == [1, 2, 3, 4, 5]


def test_interrupted_rewrite_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / METRICS_FILE
    text = '{"step": 1}\n{"step": 2}\n'
    path.write_text(text)

    def no_replace(source: Path, target: Path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", no_replace)
    with pytest.raises(OSError, match="killed here"):
        JsonlSink(path, start_step=1)
    assert path.read_text() == text


def test_a_full_disk_keeps_records_waiting_and_the_run_going(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full takes nothing; the step after finds room."""
    sink = JsonlSink(tmp_path / METRICS_FILE, start_step=0)
    disk = os.dup(sink._file.fileno())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), sink._file.fileno())
        sink.log(1, {"loss": 1.0})
        os.dup2(disk, sink._file.fileno())
    os.close(disk)
    assert "No space left on device; 1 records wait" in caplog.text
    sink.log(2, {"loss": 2.0})
    sink.close()
    assert steps(tmp_path / METRICS_FILE) == [1, 2]


def test_tensorboard_purges_repeated_steps(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0, 3: 30.0})):
        sinks = open_sinks(tmp_path, "logging.tensorboard=true", start_step=start)
        for step, loss in values.items():
            sinks.log(step, {"loss": loss})
        sinks.close()
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 20.0), (3, 30.0)]


@pytest.mark.parametrize(
    ("key", "module", "package"),
    [
        ("logging.tensorboard", "torch.utils.tensorboard", "tensorboard"),
        ("logging.wandb", "wandb", "wandb"),
    ],
)
def test_missing_package_names_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, module: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    message = f"{key}=true needs the package {package}, which is not installed"
    with pytest.raises(ConfigError, match=message):
        open_sinks(tmp_path, f"{key}=true")


def test_optional_packages_are_not_imported_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        assert not name.startswith(("wandb", "tensorboard", "torch.utils.tensorboard"))
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    sinks = open_sinks(tmp_path)
    sinks.log(1, {"loss": 1.0})
    sinks.close()
    assert "wandb" not in sys.modules
