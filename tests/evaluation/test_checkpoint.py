# SPDX-License-Identifier: Apache-2.0
"""megatron_eve.evaluation.checkpoint: which steps it takes, and what becomes of their results."""

import json
from pathlib import Path

import pytest

from megatron_eve.evaluation import checkpoint
from megatron_eve.evaluation.checkpoint import RELEASED, _parse, commands, main
from megatron_eve.training.evaluation import read_result

DEMO = {"rows": [{"name": "shape", "num_questions": 4, "right_image": 0.75},
                 {"name": "yes/no", "num_questions": 4, "right_image": 0.5}]}  # fmt: skip
LMMS = {"results": {"pope": {"alias": "pope", "pope_accuracy,none": 0.25}}}


def test_steps() -> None:
    text = "ckpt out --easy-vqa data --images 5 --tasks pope --tokenizer tok --batch-size 8"
    convert, own, lmms = commands(_parse(text.split()), released=Path("out/hf"))
    assert " ".join(convert) == (
        "megatron_eve.checkpoints_convert megatron-to-hf ckpt out/hf --tokenizer tok --overwrite"
    )
    assert (
        " ".join(own)
        == "megatron_eve.evaluation.easy_vqa out/hf data out --batch-size 8 --images 5"
    )
    assert " ".join(lmms) == (
        "megatron_eve.evaluation.lmms_eval out/hf --tasks pope --out out --batch-size 8 --resize-rule eval"
    )
    assert len(commands(_parse(["c", "o", "--tasks", "pope"]), released=Path("r"))) == 2
    with pytest.raises(SystemExit):
        _parse(["c", "o"])


@pytest.mark.parametrize("fails", [False, True])
def test_metrics_are_what_a_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The steps are stood in for; they are tested where they live."""
    ran = []

    class Done:
        returncode = 1 if fails else 0

    def run(command: list[str]) -> Done:
        ran.append(command[2])
        (tmp_path / RELEASED).mkdir(exist_ok=True)
        (tmp_path / "results.json").write_text(json.dumps(DEMO))
        (tmp_path / "20261122_results.json").write_text(json.dumps(LMMS))
        return Done()

    monkeypatch.setattr(checkpoint.subprocess, "run", run)
    (tmp_path / "hf").mkdir()  # runs/demo is a folder to write to as well, and has this one already
    code = main(["ckpt", str(tmp_path), "--easy-vqa", "data", "--tasks", "pope"])
    assert not (tmp_path / RELEASED).exists()
    assert (tmp_path / "hf").is_dir()
    if fails:
        assert (code, ran) == (1, ["megatron_eve.checkpoints_convert"])
        assert not (tmp_path / "metrics.json").exists()
        return
    assert (code, ran) == (
        0,
        [
            "megatron_eve.checkpoints_convert",
            "megatron_eve.evaluation.easy_vqa",
            "megatron_eve.evaluation.lmms_eval",
        ],
    )
    assert read_result(tmp_path / "metrics.json") == {
        "shape": 0.75, "yes/no": 0.5, "pope/pope_accuracy": 0.25,
    }  # fmt: skip
