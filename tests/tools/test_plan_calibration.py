# SPDX-License-Identifier: Apache-2.0
"""Calibration of the planner: made-up runs whose constants are known, run folders and results of benchmarks, what is
refused. No clock is asked."""

import dataclasses
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ConfigError
from tests.repo.tree import REPO
from tools.plan.__main__ import main
from tools.plan.bench_results import runs_of_benchmark
from tools.plan.calibration import CPU, CPU_RATES, MeasuredRun, fit, predict, read_run
from tools.plan.cluster import parse_cluster
from tools.plan.mix import Mix
from tools.plan.rates import assumed, read_calibration

A100 = parse_cluster("16x8xA100-40G")
TINY_MIX = Mix(vision=60, text=30, labels=15, fill=0.98)


def made_up_runs() -> tuple[list[MeasuredRun], MeasuredRun]:
    """Runs of several widths, depths, packs and layouts whose steps are exactly those of known rates."""
    truth = replace(CPU_RATES, gemm_flops_per_s=5e10, memory_bytes_per_s=8e9, layer_overhead_s=5e-3)
    shapes = [(128, 4, 512, 1, 2), (256, 4, 512, 1, 2), (256, 8, 1024, 1, 1), (512, 2, 1024, 1, 2),
              (384, 6, 512, 2, 2), (256, 4, 2048, 2, 1), (512, 8, 512, 1, 4)]  # fmt: skip
    runs = []
    for number, (hidden, layers, pack, tensor, packs) in enumerate(
        [*shapes, (384, 10, 1024, 2, 3)]
    ):
        config = apply_overrides(
            load_recipe("eve_tiny_stage3"),
            [f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"data.pack_tokens={pack}",
             f"parallel.tensor={tensor}", f"parallel.gpus_per_node={tensor}", f"batch.size={packs}"],
        )  # fmt: skip
        run = MeasuredRun(
            name=str(number), config=config, mix=TINY_MIX, micro_batches=packs, step_s=1.0
        )
        runs.append(replace(run, step_s=predict(run, rates=truth, gpu=CPU).total))
    return runs[:-1], runs[-1]


def test_a_fit_finds_the_constants_that_made_the_runs() -> None:
    runs, other = made_up_runs()
    rates = fit(runs, start=CPU_RATES, gpu=CPU)
    for run in [*runs, other]:
        assert predict(run, rates=rates, gpu=CPU).total == pytest.approx(run.step_s, rel=0.02)
    before = predict(other, rates=CPU_RATES, gpu=CPU).total
    assert abs(before / other.step_s - 1) > 0.1, "the fit had nothing to do"


def test_one_run_scales_what_was_assumed() -> None:
    runs, _ = made_up_runs()
    rates = fit(runs[:1], start=CPU_RATES, gpu=CPU)
    assert predict(runs[0], rates=rates, gpu=CPU).total == pytest.approx(runs[0].step_s, rel=0.01)
    with pytest.raises(ConfigError, match="name at least one run"):
        fit([], start=CPU_RATES, gpu=CPU)


def write_run(folder: Path, run: MeasuredRun) -> str:
    """As the trainer writes it; the first records are slow, and every step waits for data."""
    folder.mkdir()
    (folder / "config.txt").write_text(config_text(run.config))
    tokens = run.config.batch.size * run.config.data.pack_tokens
    samples = run.mix.fill * tokens / run.mix.tokens
    lines = []
    for step in range(1, 13):
        lines.append(
            {
                "step": step,
                "samples": samples,
                "vision_tokens": samples * run.mix.vision,
                "text_tokens": samples * run.mix.text,
                "label_tokens": samples * run.mix.labels,
                "computed_tokens": tokens,
                "step_time_s": run.step_s * (10 if step < 4 else 1) + 0.5,
                "data_wait_s": 0.5,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_calibrate_reads_runs_checks_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, other = made_up_runs()
    folders = [write_run(tmp_path / f"run{run.name}", run) for run in runs]
    held_out = write_run(tmp_path / "held-out", other)
    out = tmp_path / "calibration.json"
    read = read_run(tmp_path / "held-out")
    assert read.step_s == pytest.approx(other.step_s)
    assert (read.mix.vision, read.mix.fill) == pytest.approx((60, 0.98))
    assert read.micro_batches == other.micro_batches
    assert main(["calibrate", *folders, "--check", held_out, "--out", str(out)]) == 0
    assert "predicted" in capsys.readouterr().out
    assert read_calibration(out).gemm_flops_per_s > 0
    facts = json.loads(out.read_text())
    assert [row["run"] for row in facts["predicted"]] == ["held-out"]
    assert main(["calibrate", *folders, "--out", str(out)]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    wrong = write_run(tmp_path / "wrong", replace(other, step_s=2 * other.step_s))
    assert main(["calibrate", *folders, "--check", wrong]) == 1
    assert "a prediction is off by" in capsys.readouterr().err


def test_calibrate_reads_the_result_of_a_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The committed result of `make bench`: one run a stage, as it was configured and measured."""
    path = max((REPO / "docs/measurements").glob("step-*.json"))
    result = json.loads(path.read_text())
    settings, runs = result["settings"], runs_of_benchmark(path)
    assert [run.name for run in runs] == [f"step, stage {stage}" for stage in settings["stages"]]
    for run, row in zip(runs, result["rows"], strict=True):
        assert run.config.stage.name == row["stage"].split("-")[0]
        assert run.config.data.pack_tokens == row["pack_tokens"]
        assert run.config.model.hidden_size == settings["hidden"]
        assert run.config.model.num_layers == settings["layers"]
        assert run.micro_batches * row["pack_tokens"] == settings["step_tokens"]
        seconds, tokens = row["seconds"]["ours"]["wall"], row["useful_tokens_per_step"]
        assert run.step_s == statistics.median(seconds)
        assert row["samples"] * run.mix.tokens == pytest.approx(sum(tokens))
        whole = len(tokens) * settings["step_tokens"]
        assert sum(tokens) / whole == pytest.approx(row["pack_fill"], rel=1e-3)
        assert run.mix.labels == run.mix.text / (2 if run.config.data.template == "qwen2" else 1)
    out = tmp_path / "calibration.json"
    assert main(["calibrate", str(path), "--out", str(out)]) == 0
    assert f"| {runs[-1].name} | 1 |" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["fitted"]) == len(runs)


def gpu_result(run: MeasuredRun, *, step_s: float) -> dict[str, object]:
    """As tools.bench.gpu writes it at size tiny, with a case that failed."""
    packs, data = 10, run.config.data
    samples = packs * data.pack_tokens * run.mix.fill / run.mix.tokens
    row = {
        "case": "stage 2.1, 512 tokens a pack", "stage": "2.1", "pack_tokens": data.pack_tokens,
        "samples": samples, "vision_tokens": samples * run.mix.vision, "text_tokens": samples * run.mix.text,
        "label_tokens": samples * run.mix.labels, "fill": run.mix.fill, "median_step_s": step_s + 0.5,
        "median_step_without_waiting_s": step_s,
    }  # fmt: skip
    rows = [row, {"case": "stage 2.2, 512 tokens a pack", "error": "out of memory"}]
    settings = {"size": "tiny", "backend": None}
    return {"benchmark": "gpu", "settings": settings, "parts": {"full": {"rows": rows}}}


def test_calibrate_reads_the_whole_model_of_the_gpu_benchmark(tmp_path: Path) -> None:
    """Its steps have no optimizer, and so has what the model says of them."""
    from tools.bench.gpu_setting import TINY

    config = TINY.config("2.1", pack_tokens=512)
    run = MeasuredRun(
        name="", config=config, mix=TINY_MIX, micro_batches=1, step_s=1.0, with_optimizer=False
    )
    time = predict(run, rates=CPU_RATES, gpu=CPU)
    assert (
        time.optimizer
        == 0
        < predict(replace(run, with_optimizer=True), rates=CPU_RATES, gpu=CPU).optimizer
    )
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(gpu_result(run, step_s=time.total)))
    (found,) = runs_of_benchmark(path)
    assert (found.config, found.step_s, found.with_optimizer) == (config, time.total, False)
    assert dataclasses.astuple(found.mix) == pytest.approx(dataclasses.astuple(TINY_MIX))
    assert predict(found, rates=CPU_RATES, gpu=CPU).total == pytest.approx(time.total)


@pytest.mark.parametrize(
    "content",
    ['{"benchmark": "memory", "rows": []}', "[]", "{", '{"benchmark": "step", "settings": {}}'],
)
def test_what_holds_no_steps_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert main(["calibrate", str(path)]) == 2
    message = capsys.readouterr().err
    assert "is no result of a benchmark" in message or "found benchmark memory" in message
    assert main(["calibrate", str(tmp_path / "nowhere")]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_a_calibration_moves_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = assumed(A100.gpu)
    path = tmp_path / "half.json"
    slower = replace(rates, gemm_flops_per_s=rates.gemm_flops_per_s / 2)
    path.write_text(json.dumps({"rates": dataclasses.asdict(slower)}))
    arguments = ["eve7b_stage1", "--cluster", "16x8xA100-40G", "--json"]
    assert main(arguments) == 0
    before = json.loads(capsys.readouterr().out)[0]["time"]["total"]
    assert main([*arguments, "--calibration", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["time"]["total"] > 1.3 * before
