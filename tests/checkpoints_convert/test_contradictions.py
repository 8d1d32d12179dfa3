# SPDX-License-Identifier: Apache-2.0
"""Folders whose files disagree, and weights that are no numbers, are refused by name in both directions."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_config import read_hf_config
from checkpoints_convert.hf_to_megatron import plan_import
from megatron_eve.errors import CheckpointError
from megatron_eve.inference.engine import Engine
from megatron_eve.model.patch_embedding import CLIP_MEAN, CLIP_STD
from tests.checkpoint.test_fit import NAME, save_with
from tests.checkpoints_convert.test_roundtrip import IMPORT, run_export, run_import
from tests.support.tiny import layout
from tests.support.weights_text import write_word_tokenizer


@pytest.fixture
def folder(full_release: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_release[0], tmp_path / "release"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("preprocessor_config.json", {"patch_stride": 4}, "patch_stride is 4, but config.json says 2"),
        ("preprocessor_config.json", {"dense_stride": 1}, "dense_stride is 1, but config.json says 2"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .*expected .0.4814"),
        ("preprocessor_config.json", {"image_std": [0.5, 0.5, 0.5]}, "image_std is .*expected .0.2686"),
        ("config.json", {"mm_vision_tower": "openai/eve-anyratio-res800-patch14"}, "says patch_stride 2"),
        ("config.json", {"rope_scaling": {"factor": 2.0}}, "rope_scaling is .*has no type"),
        ("config.json", {"patch_stride": "2"}, "patch_stride is '2', expected a int|patch_stride is 2, but"),
        ("config.json", {"hidden_size": 64}, "the configuration says"),
        ("config.json", {"num_key_value_heads": 1}, "the configuration says"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings is true, but 'lm_head.weight' differs"),
    ],
)  # fmt: skip
def test_files_that_disagree_are_refused(
    folder: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    plan_import(folder, IMPORT)
    if file == "config.json" and "tie_word_embeddings" in fields:
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / file, **fields)
    with pytest.raises(CheckpointError, match=message):
        plan_import(folder, IMPORT)


def test_a_release_says_the_statistics_that_training_computes_with(folder: Path) -> None:
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert tuple(processor["image_mean"]) == CLIP_MEAN
    assert tuple(processor["image_std"]) == CLIP_STD


def test_strides_of_the_processor_are_used_where_the_configuration_says_none(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["patch_stride"], config["dense_stride"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_hf_config(folder, patch_embed_dim=0).model.patch_stride == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.moe_k_proj.bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_no_number_is_not_converted(  # type: ignore[no-untyped-def]
    folder: Path, tmp_path: Path, gloo1, name: str, value: float
) -> None:
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[3] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (message,) = gloo1.run(run_import, folder, tmp_path / "megatron")
    assert f"{name} holds 1 values of {state[name].numel()} that are NaN or infinite" in message
    assert not (tmp_path / "megatron").exists()
    with pytest.raises(CheckpointError, match=f"{name} holds 1 values"):
        Engine.load(folder, device=torch.device("cpu"))


def test_what_becomes_infinite_by_rounding_is_not_converted(  # type: ignore[no-untyped-def]
    folder: Path, tmp_path: Path, gloo1
) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = 3.4e38  # beyond the largest bf16
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (message,) = gloo1.run(run_import, folder, tmp_path / "megatron", dtype="bf16")
    assert "as torch.bfloat16: final_layernorm.weight holds 1 values" in message


def test_another_tokenizer_is_not_released(tmp_path: Path, folder: Path, gloo1) -> None:  # type: ignore[no-untyped-def]
    """The one of the folder that was converted is recorded with the weights."""
    megatron = tmp_path / "megatron"
    gloo1.run(run_import, folder, megatron)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    (message,) = gloo1.run(run_export, megatron, tmp_path / "out", other, 16)
    assert f"the tokenizer {other} is not the one of the weights {megatron}" in message
    assert gloo1.run(run_export, megatron, tmp_path / "out", folder, 16) == [""]


def test_a_value_that_is_no_number_is_not_released(tmp_path: Path, gloo1) -> None:  # type: ignore[no-untyped-def]
    megatron = tmp_path / "megatron"
    gloo1.run(save_with, float("inf"), NAME, str(megatron), layout())
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer", ["a"], special=["<|im_end|>"])
    (message,) = gloo1.run(run_export, megatron, tmp_path / "out", tokenizer, 16)
    assert "model.layers.2.moe_mlp.down_proj.weight holds 1 values" in message
    assert not (tmp_path / "out").exists()
