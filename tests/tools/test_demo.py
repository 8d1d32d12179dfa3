# SPDX-License-Identifier: Apache-2.0
"""tools.demo: its plans, its command line, and one run of the whole path."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_eve.config.schema import EvaluationConfig
from megatron_eve.evaluation.scoring import OPEN
from megatron_eve.training.evaluation import Evaluations
from tests.repo.tree import REPO, text_of
from tests.support.warm_python import warm_python
from tools.demo.__main__ import main
from tools.demo.pipelines import DEMOS, DemoOptions
from tools.demo.steps import plan_lines
from tools.demo.summary import stage_speed


@pytest.mark.parametrize("name", sorted(DEMOS))
def test_stages_follow_each_other(name: str) -> None:
    out = Path("runs/x")
    demo = DEMOS[name](DemoOptions(out=out, overrides=("train.steps=7",)))
    assert {stage.config.train.steps for stage in demo.stages} == {7}
    before = [stage.config.checkpoint.load_weights_from for stage in demo.stages]
    assert before[1:] == [stage.config.run_dir for stage in demo.stages[:-1]]
    sources = {s.name: [x.proportion for x in s.config.data.sources] for s in demo.stages}
    assert sources["stage1"] == sources["stage2_1"] == [0.98, 0.02]
    assert sources["stage2_2"] == pytest.approx([0.85, 0.15])
    assert sources["stage3"] == [1.0]
    names = [step.name for step in demo.steps]
    assert len(set(names)) == len(names)
    assert names[-3:] == ["evaluate", "samples", "curves"]
    text = "\n".join(plan_lines(demo.steps, out=out))
    assert (
        f"--nproc-per-node 2 -m megatron_eve.train {name.replace('-', '_').split('_')[0]}" in text
    )


def test_stage_speed(tmp_path: Path) -> None:
    """Ten steps of 1 s and 10 more of 3 s at half the tokens per second, on two processes."""
    demo = DEMOS["eve-tiny"](DemoOptions(out=tmp_path))
    (tmp_path / "text").mkdir()
    record = {"loss": 2.0, "fill": 0.9, "step_time_s": 1.0, "tokens_per_s_per_gpu": 100.0}
    second = record | {"step": 20, "loss": 1.0, "step_time_s": 3.0, "tokens_per_s_per_gpu": 50.0}
    lines = [json.dumps(record | {"step": 10}), json.dumps(second)]
    (tmp_path / "text" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    speed = stage_speed(demo.stages[0])
    assert (speed.steps, speed.last_loss, speed.step_time_s) == (20, 1.0, 2.0)
    assert speed.tokens_per_s == pytest.approx(2 * (10 * 100 + 30 * 50) / 40)
    assert speed.fill == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--override", "optim.peak=1"], "optim.peak"),
        (["--override", "run_dir=elsewhere"], "the demo sets run_dir"),
        (["--stop-after", "lunch"], "choose one of easy-vqa, photos"),
        (["--train-images", "1"], "--train-images 1 is too few"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eve-tiny", "--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smollm2", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "text-frozen (to do)" in lines
    assert lines[-1].endswith(f"nothing was written to {tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()


@pytest.mark.timeout(600)
def test_the_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything that `make demo` does, two steps a stage and few images: it runs, and says that the model is blind.

    Up to the first training by new interpreters, from there on by such that have imported torch."""
    monkeypatch.chdir(REPO)
    out = tmp_path / "demo"
    overrides = ["train.steps=2", "batch.size=1", "data.pack_tokens=512", "logging.every_steps=1"]
    command = ["eve-tiny", "--out", str(out), "--train-images", "40", "--test-images", "8"]
    command += [word for override in overrides for word in ("--override", override)]
    assert main([*command, "--stop-after", "text"]) == 0
    first = capfd.readouterr().out
    assert first.splitlines()[-1] == f"stopped after text; wrote the steps up to it to {out}"
    assert "step 2/2 | loss" in first
    assert "step 2/2 | loss" in (out / "text" / "train.log").read_text()

    monkeypatch.setattr(sys, "executable", warm_python())
    assert main(command) == 1
    second = capfd.readouterr()
    assert "[5/13] text: already done" in second.out
    assert "error: not met: shape: " in second.err
    assert second.out.splitlines()[-1].endswith(f"hf/ to {out}")
    for name in ("results.md", "samples.md", "samples.png", "curves.png", "summary.md"):
        assert (out / name).stat().st_size > 100, name
    for stage in ("text", "stage1", "stage2_1", "stage2_2", "stage3"):
        assert (out / stage / "config.txt").is_file(), stage
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert rows[OPEN]["num_questions"] + rows["yes/no"]["num_questions"] > 50

    started = time.monotonic()
    assert main(command) == 1
    assert time.monotonic() - started < 2
    assert "+ python" not in capfd.readouterr().out
    assert main([*command, "--override", "train.steps=3"]) == 2
    assert "step text was done with other options" in capfd.readouterr().err
    assert_documented_evaluation(out)


def assert_documented_evaluation(demo: Path) -> None:
    """The command that docs/evaluation.md gives to `evaluation.command`, started as a run starts it on its checkpoint:
    its figures are the demo's own, of the same weights."""
    (command,) = re.findall(r'"evaluation\.command=python (.*?)"', text_of("docs/evaluation.md"))
    for documented, here in (("runs/demo/", f"{demo}/"), (" --images 50", " --images 8")):
        assert documented in command
        command = command.replace(documented, here)
    config = EvaluationConfig(command=f"{sys.executable} {command}", timeout_s=300)
    found = Evaluations(config, run_dir=demo / "stage3", is_starter=True)
    found.saved(2)
    found.finish(give_up=lambda: False)
    out = demo / "stage3/evaluations/step_00000002"
    log = (out / "log.txt").read_text()
    rows = json.loads((demo / "results.json").read_text())["rows"]
    expected = {f"evaluation/{row['name']}": row["right_image"] for row in rows}
    about = {"evaluated_step": 2.0, "evaluations_unfinished": 0.0}
    assert found.news() == expected | about, log
    assert (out / "answers.jsonl").read_text() == (demo / "answers.jsonl").read_text()
