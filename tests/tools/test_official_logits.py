# SPDX-License-Identifier: Apache-2.0
"""tools.official_logits with the plain reference in the place of the official classes: same logits, others, misfits."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.tokenizer import train_bpe
from tests.checkpoints_convert.conftest import CORPUS, release_model, write_reference_release
from tests.support.reference_eve import (
    IMAGE_PLACEHOLDER,
    ReferenceEve,
    ReferenceSample,
    build_reference,
)
from tests.support.tiny import ALL
from tools.official_logits import IMAGE_ID, main


class StandIn:
    """Reads ids and pixels as the official model does: an image is one id, pixels are whole images."""

    report: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}  # noqa: RUF012
    shift = 0.0

    def __init__(self, eve: ReferenceEve) -> None:
        self._eve = eve

    def from_pretrained(
        self, folder: str, **options: Any
    ) -> tuple["StandIn", dict[str, list[str]]]:
        assert options == {"torch_dtype": torch.float32, "output_loading_info": True}
        tower = json.loads(Path(folder, "config.json").read_text())["mm_vision_tower"]
        assert Path(tower, "preprocessor_config.json").is_file(), (
            "relative to the working directory"
        )
        return self, self.report

    def eval(self) -> "StandIn":
        return self

    def __call__(self, *, input_ids: torch.Tensor, images: list[torch.Tensor] | None) -> Any:
        ids = torch.where(input_ids[0] == IMAGE_ID, IMAGE_PLACEHOLDER, input_ids[0])
        logits = self._eve(ReferenceSample(ids, tuple(images or ()))).logits + self.shift
        input_ids.zero_()  # the official code writes into it
        return SimpleNamespace(logits=logits[None])


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """In a folder with a release of the same weights."""
    train_bpe(CORPUS * 3, tmp_path / "bpe", 320)
    eve = build_reference(release_model(ALL, tmp_path / "bpe"), seed=4).eval()
    write_reference_release(tmp_path / "eve", eve, tmp_path / "bpe")
    found, module = StandIn(eve), ModuleType("eve_qwen2")
    module.EVEQwen2ForCausalLM = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eve.model.language_model.eve_qwen2", module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return found


def test_what_the_official_classes_say(
    official: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["record", "eve", "logits.safetensors"]) == 0
    assert "the logits of 8 questions" in capsys.readouterr().out
    stored = load_file("logits.safetensors")
    assert [int((stored[f"{n}.ids"] == IMAGE_ID).sum()) for n in range(8)] == [1] * 6 + [2, 0]
    assert stored["0.image0"].shape != stored["3.image0"].shape, "another resize rule"

    compare = ["compare", "eve", "logits.safetensors", "--checkout", "EVEv2"]
    assert main(compare) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and last == "within the limit 1e-05 of the largest logit"
    assert Path.cwd() == tmp_path
    official.shift = 1e-3 * float(stored["0.logits"].abs().max())
    assert main(compare) == 1
    assert "beyond the limit" in capsys.readouterr().out
    assert main([*compare, "--tolerance", "0.1"]) == 0

    official.report = {"missing_keys": ["model.norm.weight"], "mismatched_keys": []}
    assert main(compare) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "missing_keys: model.norm.weight"
