# SPDX-License-Identifier: Apache-2.0
"""The benchmark of inference compares variants that compute the same. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch

from megatron_eve.config.variants import VARIANTS
from megatron_eve.inference.decoder import EveForInference
from tools.bench.inference import DENSE, Setting, build_contenders, main
from tools.bench.report import BenchmarkError
from tools.bench.setting import Scale

SMALL = ["--hidden", "256", "--layers", "1", "--image-edge", "3", "--text-tokens", "5"]


def test_every_variant_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), *SMALL, "--new-tokens", "2", "--rounds", "2"]
    assert main([*arguments, "--batch-size", "2"]) == 0
    result = json.loads((tmp_path / "inference.json").read_text())
    assert [row["variant"] for row in result["rows"]] == list(VARIANTS)
    assert {row["prompt_tokens"] for row in result["rows"]} == {5 + 3 * 3 + 3 + 1}
    parameters = {row["variant"]: row["parameters"] for row in result["rows"]}
    assert parameters[DENSE] < parameters["eve-v1.5"] < parameters["eve-v2.0"]
    dense = result["rows"][0]
    assert (dense["first_token_ratio"], dense["tokens_per_s_ratio"]) == (1.0, 1.0)
    assert result["hardware"]["cores"]
    assert "| eve-v2.0 |" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_variants_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = EveForInference.prefill

    def wrong(self: EveForInference, *args: object, **named: object) -> torch.Tensor:
        return prefill(self, *args, **named) + self.config.split.ffn  # type: ignore[arg-type]

    monkeypatch.setattr(EveForInference, "prefill", wrong)
    setting = Setting(
        scale=Scale(hidden_size=256, num_layers=1, token_share=1.0), image_edge=2, text_tokens=3,
        new_tokens=1, batch_size=1, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(BenchmarkError, match=r"logits of eve-v1.5 and eve-v1.0 differ by 1"):
        build_contenders(setting, [DENSE, "eve-v1.5"])
