# SPDX-License-Identifier: Apache-2.0
"""Killed anywhere and started again until it is done, a run is the one that nobody disturbed, to the last bit.

Two stages of a tiny recipe on real shards: the second trains other weights on packs of another size and starts from the
first. Each numbered kill point draws its phase, moment, signal and rank from its number (support/kill_points.py).
`make test` runs a few; `make test-kill N=100` runs as many as are asked for and writes runs/test-kill.jsonl."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_eve.checkpoint.manifest import Manifest, check_folder, read_manifest
from megatron_eve.run_files import newest_first
from tests.support.kill_points import (
    EVALUATED,
    PHASES,
    SAVE_EVERY,
    STEPS,
    Kill,
    KillPoint,
    kill_point,
)
from tests.support.tiny import layout
from tests.support.zygote import Start, Zygote
from tests.training.test_run import records

# Killed again while resuming the second stage; a writer; two processes, while one evaluates.
FEW = (13, 16, 19)
ALL = range(int(os.environ.get("KILL_POINTS", "0")))
MAX_STARTS = 6
EVALUATION = Path(__file__).parents[1] / "support" / "manifest_metric.py"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """Forks trainers."""
    process = Zygote()
    yield process
    process.close()


@dataclass(frozen=True)
class Curriculum:
    """Starts the two stages of a run in `folder`."""

    zygote: Zygote
    data: Path
    folder: Path
    processes: int
    num_workers: int = 1

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def stage_dir(self, stage: str) -> Path:
        return self.folder / stage

    def start(self, stage: str, *, before: Any = None) -> list[int]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = self._argv(stage)
        return self.zygote.run(
            Start(argv=argv, processes=self.processes, port=port, log=self.log, before=before)
        )

    def finish(self, stage: str) -> int:
        """Start the stage until it is done; how often that took."""
        for count in range(MAX_STARTS):
            if (self.stage_dir(stage) / "DONE").exists():
                return count
            self.start(stage)
        raise AssertionError(f"not done after {MAX_STARTS} starts:\n{self.log.read_text()[-4000:]}")

    def _argv(self, stage: str) -> list[str]:
        first = stage == "first"
        return [
            "eve_tiny_stage1" if first else "eve_tiny_stage2_1",
            f"run_dir={self.stage_dir(stage)}",
            "data.sources=()",
            f"data.sources.0.path={self.data / 'shards'}",
            "data.sources.0.proportion=1",
            f"data.tokenizer={self.data / 'tokenizer'}",
            "data.template=qwen2",
            "data.image_edge=96",
            "data.max_text_tokens=150",
            f"data.pack_tokens={512 if first else 448}",
            f"data.num_workers={self.num_workers}",
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.ffn_hidden_size=64",
            "model.head_dim=8",
            "batch.size=2",
            f"parallel.gpus_per_node={self.processes}",
            f"parallel.tensor={1 if first else self.processes}",
            "parallel.sequence_parallel=false",
            f"checkpoint.load_weights_from={'none' if first else self.stage_dir('first')}",
            f"checkpoint.save_every_steps={SAVE_EVERY}",
            "checkpoint.keep_last=2",  # an evaluation may begin when the next checkpoint is there already
            f"evaluation.command={sys.executable} -I -S {EVALUATION} {{checkpoint}} {{out}}",
            f"evaluation.every_steps={EVALUATED}",
            "evaluation.timeout_s=60",
            "logging.every_steps=1",
            f"train.steps={STEPS}",
        ]


class Undisturbed:
    """Runs that nobody disturbs, by number of processes, each stage made when it is first asked for."""

    def __init__(self, zygote: Zygote, data: Path, folder: Path) -> None:
        self._zygote, self._data, self._folder = zygote, data, folder

    def stage_dir(self, stage: str, *, processes: int) -> Path:
        folder = self._folder / str(processes)
        folder.mkdir(exist_ok=True)
        run = Curriculum(self._zygote, self._data, folder, processes)
        for name in ("first", "second") if stage == "second" else ("first",):
            assert run.finish(name) <= 1, run.log.read_text()[-4000:]
        return run.stage_dir(stage)


@pytest.fixture(scope="module")
def undisturbed(zygote, small_data, tmp_path_factory) -> Undisturbed:  # type: ignore[no-untyped-def]
    return Undisturbed(zygote, small_data, tmp_path_factory.mktemp("undisturbed"))


def last_manifest(run_dir: Path) -> Manifest:
    """Of the newest checkpoint."""
    folder = newest_first(run_dir)[0]
    check_folder(folder)
    return read_manifest(folder)


def shards(manifest: Manifest) -> dict[str, Any]:
    """Files with tensors and random generators, byte for byte."""
    return {name: entry for name, entry in manifest.files.items() if name.endswith(".distcp")}


def trained(run_dir: Path) -> list[dict[str, float]]:
    """Records without the evaluation's, which come into whichever record is next."""
    return [
        {name: value for name, value in record.items() if not name.startswith("evaluat")}
        for record in records(run_dir)
    ]


def evaluated(run_dir: Path) -> dict[int, dict[str, float]]:
    """Metrics of each step whose evaluation was done."""
    path = run_dir / "evaluations.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    assert {record["outcome"] for record in found} <= {"done", "stopped"}
    return {record["step"]: record["metrics"] for record in found if record["outcome"] == "done"}


def survive(point: KillPoint, run: Curriculum, undisturbed: Undisturbed) -> dict[str, Any]:
    """Kill, start again until done, compare. What to write into the log."""
    if point.stage == "second":
        first = undisturbed.stage_dir("first", processes=point.processes)
        shutil.copytree(first, run.stage_dir("first"))
    codes = []
    for kill in point.kills:
        codes.append(run.start(point.stage, before=kill))
        assert kill.reached.exists(), f"{kill} was not reached:\n{run.log.read_text()[-20000:]}"
        # A run that is done is not started again, also if it was killed as it waited for its evaluation.
        was_done = (run.stage_dir(point.stage) / "DONE").exists()
        for checkpoint in newest_first(run.stage_dir(point.stage)):
            check_folder(checkpoint)
    starts = run.finish(point.stage)
    stages = ("first", "second") if point.kills[-1].phase == "end" else (point.stage,)
    if point.kills[-1].phase == "end" and point.stage == "first":
        run.finish("second")
    for stage in stages:
        whole = undisturbed.stage_dir(stage, processes=point.processes)
        found, expected = last_manifest(run.stage_dir(stage)), last_manifest(whole)
        assert trained(run.stage_dir(stage)) == trained(whole)
        assert was_done or evaluated(run.stage_dir(stage)) == evaluated(whole)
        assert list(evaluated(whole)) == [EVALUATED]
        assert found.tensors == expected.tensors
        assert found.facts == expected.facts
        assert shards(found) == shards(expected)
    return {"codes": codes, "starts_after": starts}


def run_point(
    number: int, folder: Path, zygote: Zygote, data: Path, undisturbed: Undisturbed
) -> None:
    point = kill_point(number, folder)
    begun = time.monotonic()
    entry: dict[str, Any] = {
        "number": number,
        "stage": point.stage,
        "processes": point.processes,
        "kills": [kill.told() for kill in point.kills],
        "identical": False,
    }
    run = Curriculum(zygote, data, folder, point.processes)
    try:
        entry |= survive(point, run, undisturbed)
        entry["identical"] = True
    finally:
        entry["seconds"] = round(time.monotonic() - begun, 2)
        if log := os.environ.get("KILL_LOG"):
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        shutil.rmtree(folder / "first", ignore_errors=True)
        shutil.rmtree(folder / "second", ignore_errors=True)


@pytest.mark.parametrize("number", FEW)
def test_a_few_kill_points(zygote, small_data, undisturbed, tmp_path, number):  # type: ignore[no-untyped-def]
    run_point(number, tmp_path, zygote, small_data, undisturbed)


@pytest.mark.kill
@pytest.mark.parametrize("number", ALL)
def test_kill_point(zygote, small_data, undisturbed, tmp_path, number):  # type: ignore[no-untyped-def]
    run_point(number, tmp_path, zygote, small_data, undisturbed)


def test_another_layout_and_number_of_workers_go_on(zygote, small_data, undisturbed, tmp_path):  # type: ignore[no-untyped-def]
    """Stopped in one process with one loader thread; two data-parallel processes with three threads go on."""
    one = Curriculum(zygote, small_data, tmp_path, 1)
    stop = Kill(
        phase="step",
        occurrence=2,
        delay_s=0.0,
        signal="SIGTERM",
        rank=0,
        reached=tmp_path / "reached",
    )
    assert one.start("first", before=stop) == [0]
    stopped = json.loads((tmp_path / "first" / "latest_step").read_text())
    assert 2 <= stopped < STEPS
    two = Curriculum(zygote, small_data, tmp_path, 2, num_workers=3)
    assert two.start("first") == [0, 0], two.log.read_text()[-4000:]
    found = trained(tmp_path / "first")
    expected = trained(undisturbed.stage_dir("first", processes=1))
    for now, before in zip(found, expected, strict=True):
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-6), now["step"]
        assert now["samples_checksum"] == before["samples_checksum"], now["step"]
    assert found[:stopped] == expected[:stopped]


def killed_in_the_background(run_dir: Path) -> bool:
    """Whether the signal was sent by the time that the file counts as written."""
    from megatron_eve.checkpoint.manager import CheckpointManager
    from megatron_eve.checkpoint.writer import _ShardWriter
    from tests.checkpoint.test_faults import assemble

    reached = run_dir / "reached"
    kill = Kill(phase="write", occurrence=1, delay_s=0.5, signal="SIGCONT", rank=0, reached=reached)
    manager = CheckpointManager(run_dir, keep_last=1, config_text="", async_save=True)
    with patch.object(_ShardWriter, "write", _ShardWriter.write):
        kill(rank=0)
        manager.save(assemble(layout()), step=1, data={})
        manager.wait()
    return reached.exists()


def test_a_kill_while_writing_is_not_late(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    """A file of this size is written sooner than most of these signals come."""
    assert gloo1.run(killed_in_the_background, tmp_path) == [True]


def test_every_phase_comes_round(tmp_path: Path) -> None:
    """Also in two processes, and in both stages, with both signals."""
    points = [kill_point(number, tmp_path) for number in range(100)]
    for processes in (1, 2):
        phases = {kill.phase for p in points if p.processes == processes for kill in p.kills}
        assert phases == set(PHASES)
    assert {(p.stage, k.signal) for p in points for k in p.kills} == {
        (stage, name) for stage in ("first", "second") for name in ("SIGKILL", "SIGTERM")
    }
    assert kill_point(7, tmp_path) == points[7]
