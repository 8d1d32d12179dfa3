# SPDX-License-Identifier: Apache-2.0
"""What a capture records, on a CPU through torch.profiler; that it changes nothing and leaves nothing; its commands."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config.schema import ParallelConfig, ProfileConfig, RunConfig
from megatron_eve.errors import ConfigError
from tests.repo.tree import REPO
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import run_config
from tests.tools.profile_runs import nsys_without_cuda, steps
from tests.training.conftest import small_data  # noqa: F401  (a fixture)
from tools.profile.__main__ import main
from tools.profile.figures import RankFigures
from tools.profile.kineto import read_kineto
from tools.profile.launch import parse_window, rank_command

PARTS = ("input_layernorm", "linear_qkv", "linear_proj", "pre_mlp_layernorm")
FFN = ("linear_fc1", "linear_fc2")  # the partitioned MLP calls their branches itself
LAYERS, MICRO_BATCHES, WINDOW = 2, 2, (2, 3)


def config_of(parallel: ParallelConfig, *, recompute: str = "none", **profile: Any) -> RunConfig:
    model = tiny_model(layers=LAYERS)
    config = run_config(model, parallel, train={"recompute": recompute})
    fields = {"first_step": WINDOW[0], "last_step": WINDOW[1], **profile}
    return dataclasses.replace(config, profile=ProfileConfig(**fields))


@pytest.fixture(scope="module")
def captured(gloo1, tmp_path_factory) -> tuple[Path, dict[str, Any]]:  # type: ignore[no-untyped-def]
    """Four steps of which the second and third are captured."""
    run_dir = tmp_path_factory.mktemp("capture")
    config = config_of(layout(), tool="kineto")
    (seen,) = gloo1.run(steps, config, run_dir=str(run_dir), count=4)
    return run_dir / "profile", seen


def ranges_of(folder: Path, rank: int = 0) -> Counter[str]:
    trace = read_kineto(folder / f"rank{rank:04d}.kineto.json", rank=rank)
    return Counter(item.name for item in trace.ranges)


def test_every_part_of_a_step_has_its_range(captured) -> None:  # type: ignore[no-untyped-def]
    names = ranges_of(captured[0])
    num_steps = WINDOW[1] - WINDOW[0] + 1
    assert [names[f"step={number}"] for number in range(1, 5)] == [0, 1, 1, 0]
    for number in range(MICRO_BATCHES):
        assert names[f"forward={number}"] == names[f"backward={number}"] == num_steps
    assert names["optimizer"] == num_steps
    calls = num_steps * MICRO_BATCHES
    for phase in ("", "/backward"):
        assert [names[f"layer={n}{phase}"] for n in range(1, LAYERS + 1)] == [calls] * LAYERS
        assert names[f"permutation{phase}"] == 2 * calls * LAYERS  # to sequence order and back
        for part in (*PARTS, *FFN):
            for modality in ("vision", "text"):
                assert names[f"module={part}.{modality}{phase}"] == calls * LAYERS, (part, phase)
        assert names[f"module=core_attention{phase}"] == calls * LAYERS
        assert names[f"module=patch_embedding{phase}"] == calls
    assert names["mcore=forward-backward"] == num_steps


def test_ranges_of_the_backward_lie_in_it_and_nest(captured) -> None:  # type: ignore[no-untyped-def]
    trace = read_kineto(captured[0] / "rank0000.kineto.json", rank=0)
    backward = [r for r in trace.ranges if r.name.startswith("backward=")]
    layers = [r for r in trace.ranges if r.name.startswith("layer=") and "/backward" in r.name]
    for inner in (r for r in trace.ranges if r.name.endswith("/backward")):
        assert any(o.start <= inner.start and inner.end <= o.end for o in backward), inner
        if inner.name.startswith(("module=linear_fc", "permutation")):
            assert any(o.start <= inner.start and inner.end <= o.end for o in layers), inner


def test_work_of_both_modalities_and_phases_is_found(captured) -> None:  # type: ignore[no-untyped-def]
    figures = RankFigures(read_kineto(captured[0] / "rank0000.kineto.json", rank=0))
    modules = {row["module"]: row for row in figures.by_module()}
    for part in (*PARTS, *FFN):
        for modality in ("vision", "text"):
            row = modules[f"{part}.{modality}"]
            assert row["forward_s"] > 0 and row["backward_s"] > 0, row
    for module in ("permutation", "core_attention"):
        assert modules[module]["forward_s"] > 0 and modules[module]["backward_s"] > 0
    assert modules["optimizer"]["other_s"] > 0
    division = figures.division()
    assert sum(
        division[name]
        for name in ("compute_s", "exposed_communication_s", "exposed_copies_s", "idle_s")
    ) == pytest.approx(figures.step_time_s, rel=1e-9)


def test_nothing_is_left_before_and_after_the_window(captured) -> None:  # type: ignore[no-untyped-def]
    """So a step that is not captured runs the code that a run without profile.* runs."""
    hooks = captured[1]["hooks"]
    assert hooks[0] == hooks[2] == hooks[3] == 0 < hooks[1]


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [(layout(), "none"), (layout(), "selective"), (layout(), "full")],
    ids=["plain", "selective", "full"],
)
def test_a_capture_changes_no_bit(gloo1, tmp_path, parallel, recompute) -> None:  # type: ignore[no-untyped-def]
    (plain,) = gloo1.run(
        steps, config_of(parallel, recompute=recompute), run_dir=str(tmp_path), count=3
    )
    (recorded,) = gloo1.run(
        steps,
        config_of(parallel, recompute=recompute, tool="kineto"),
        run_dir=str(tmp_path),
        count=3,
    )
    for name in ("loss", "grad_norm", "weights"):
        assert recorded[name] == plain[name], name


def test_a_capture_that_cannot_be_written_ends_no_run(gloo1, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "profile").write_text("a file where the folder of captures should be")
    config = config_of(layout(), tool="kineto")
    (seen,) = gloo1.run(steps, config, run_dir=str(tmp_path), count=4)
    assert len(seen["loss"]) == 4


@pytest.mark.parametrize(
    "parallel",
    [layout(pipeline=2), layout(tensor=2, sequence_parallel=True)],
    ids=["pp2", "tp2-sp"],
)
def test_two_processes_of_which_one_is_captured(gloo2, tmp_path, parallel) -> None:  # type: ignore[no-untyped-def]
    plain = gloo2.run(steps, config_of(parallel), run_dir=str(tmp_path), count=3)
    config = config_of(parallel, tool="kineto", ranks=(1,))
    recorded = gloo2.run(steps, config, run_dir=str(tmp_path), count=3)
    for before, after in zip(plain, recorded, strict=True):
        assert (after["loss"], after["weights"]) == (before["loss"], before["weights"])
    assert recorded[0]["hooks"] == [0, 0, 0]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "rank0001.kineto.json",
        "rank0001.steps.json",
    ]
    trace = read_kineto(tmp_path / "profile" / "rank0001.kineto.json", rank=1)
    layers = {item.name for item in trace.ranges if item.name.startswith("layer=")}
    assert ("layer=1" in layers) == (parallel.pipeline == 1)
    assert RankFigures(trace).division()["communication_s"] > 0


def test_nsys_without_cuda_is_refused(gloo1, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (message,) = gloo1.run(
        nsys_without_cuda, config_of(layout(), tool="nsys"), run_dir=str(tmp_path)
    )
    assert "there is no CUDA device; use profile.tool=kineto" in message


def test_run_command_reports_the_steps_of_the_log(small_data, tmp_path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """The trainer in a process of its own; the trace's step time is the one that the run logged."""
    run_dir = tmp_path / "run"
    arguments = [
        "run",
        "eve_tiny_stage3",
        f"data.sources.0.path={small_data / 'shards'}",
        f"data.tokenizer={small_data / 'tokenizer'}",
        "data.image_edge=96",
        "data.max_text_tokens=250",
        "data.pack_tokens=512",
        "model.num_layers=2",
        "batch.size=4",
        "parallel.gpus_per_node=1",
        "parallel.tensor=1",
        "checkpoint.load_weights_from=none",
        "logging.every_steps=1",
    ]
    command = [sys.executable, "-m", "tools.profile", *arguments, "--out", str(run_dir)]
    with (tmp_path / "output").open("w") as output:
        done = subprocess.run(
            [*command, "--steps", "4-6"], cwd=REPO, stdout=output, stderr=output, timeout=200
        )
    assert done.returncode == 0, (tmp_path / "output").read_text()[-3000:]
    report = json.loads((run_dir / "profile" / "report.json").read_text())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    logged = {row["step"]: row for row in map(json.loads, lines)}
    captured_rows = [logged[number] for number in (4, 5, 6)]
    mean = sum(row["step_time_s"] for row in captured_rows) / 3
    assert report["steps"] == [4, 5, 6]
    assert report["step_time_s"] == pytest.approx(mean, rel=0.05)
    assert report["throughput"]["tokens_per_s"] * report["step_time_s"] == pytest.approx(
        sum(row["vision_tokens"] + row["text_tokens"] for row in captured_rows) / 3
    )


@pytest.mark.parametrize(
    ("text", "first", "last", "ranks"),
    [("10-12", 10, 12, (0,)), ("7", 7, 7, (0,)), ("10-12@0,8", 10, 12, (0, 8))],
)
def test_windows_have_three_forms(text: str, first: int, last: int, ranks: tuple[int, ...]) -> None:
    window = parse_window(text)
    assert (window.first_step, window.last_step, window.ranks) == (first, last, ranks)


@pytest.mark.parametrize("text", ["", "0-3", "12-10", "ten", "10-12@", "10-12@-1"])
def test_other_windows_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no steps; write FIRST-LAST"):
        parse_window(text)


def test_only_captured_ranks_run_under_nsys() -> None:
    window = parse_window("10-12@8")
    training = ["python", "-m", "megatron_eve.train", "eve7b_stage1", "run_dir=runs/a b"]
    overrides = [
        "profile.tool=nsys",
        "profile.first_step=10",
        "profile.last_step=12",
        "profile.ranks=8",
    ]
    other = rank_command(training, window=window, rank=0, nsys=True)
    assert other == [*training, *overrides]
    captured_rank = rank_command(training, window=window, rank=8, nsys=True)
    assert captured_rank[:2] == ["nsys", "profile"]
    assert "--capture-range=cudaProfilerApi" in captured_rank
    assert "--output=runs/a b/profile/rank0008" in captured_rank
    assert captured_rank[-len(other) :] == other
    without = rank_command(training, window=window, rank=8, nsys=False)
    assert without == [*training, "profile.tool=kineto", *overrides[1:]]
    with pytest.raises(ConfigError, match="sets no run_dir="):
        rank_command(training[:-1], window=window, rank=8, nsys=True)


def test_command_prints_one_line_for_each_captured_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["command", "eve7b_stage1", "--steps", "5-6@0,9", "train.seed=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("--output=")[1].split()[0] for line in lines] == [
        "runs/eve7b_stage1/profile/rank0000",
        "runs/eve7b_stage1/profile/rank0009",
    ]
    assert all("train.seed=1 profile.tool=nsys profile.first_step=5" in line for line in lines)


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["command", "eve7b_stage1", "seed"], ["report", "x", "train.seed=1"]):
        with pytest.raises(SystemExit):
            main([*words, "--steps" if words[0] == "report" else "--nonsense"])
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_rank_of_a_job_becomes_its_command(tmp_path: Path) -> None:
    """slurm/rank.sh with EVE_PROFILE, on a machine without nsys: the command itself, with profile.* behind it."""
    run_dir = f"run_dir={tmp_path}"
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    environment = {**os.environ, **slurm, "PYTHON": sys.executable, "EVE_PROFILE": "10-12@3"}
    result = subprocess.run(
        ["bash", "slurm/rank.sh", "echo", "train", run_dir],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.stdout.split() == [
        "train",
        run_dir,
        "profile.tool=kineto",
        "profile.first_step=10",
        "profile.last_step=12",
        "profile.ranks=3",
    ], result.stderr
