# SPDX-License-Identifier: Apache-2.0
"""Loading a released folder: every wrong file, field or tensor is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_config import read_hf_config
from megatron_eve.errors import CheckpointError
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.release import read_release

CPU = torch.device("cpu")


@pytest.fixture
def copy(released_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released_folder, tmp_path / "eve"))


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_says_what_the_converter_reads(released_folder: Path) -> None:
    info = read_release(released_folder)
    assert info.model == read_hf_config(released_folder, patch_embed_dim=1).model
    assert (info.images.edge, info.images.resize_rule) == (16, "train")
    assert info.repetition_penalty == 1.0
    assert info.stop_ids == (319, 317)  # <|im_end|> and <|endoftext|>


def test_a_repetition_penalty_of_the_folder_is_known(copy: Path) -> None:
    for given, found in ((1.05, 1.05), (2, 2.0), (None, 1.0)):
        edit(copy / "generation_config.json", repetition_penalty=given)
        assert read_release(copy).repetition_penalty == found


def test_a_folder_says_whether_pictures_are_turned(copy: Path) -> None:
    """Releases of before the field turned them."""
    for given, found in ((True, True), (False, False), (None, True)):
        edit(copy / "preprocessor_config.json", exif_rotation=given)
        assert read_release(copy).images.exif_rotation is found


def test_needs_nothing_but_data(copy: Path) -> None:
    """The folder's Python files and generation_config.json are not read."""
    for path in (*copy.glob("*.py"), copy / "generation_config.json"):
        path.unlink()
    assert Engine.load(copy, device=CPU).info.stop_ids == read_release(copy).stop_ids


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": "qwen2"}, r"model_type is 'qwen2', expected 'eve-qwen2'"),
        ("config.json", {"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ("config.json", {"use_sliding_window": True}, r"use_sliding_window is true"),
        (
            "config.json",
            {"rope_scaling": {"type": "yarn"}},
            r"rope_scaling has RoPE of type 'yarn'",
        ),
        (
            "config.json",
            {"rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta is .* and 500000.0 in rope_parameters",
        ),
        ("config.json", {"hidden_size": None}, r"hidden_size is None, expected a int"),
        ("config.json", {"num_hidden_layers": True}, r"num_hidden_layers is True"),
        ("config.json", {"add_moe": None}, r"add_moe is None"),
        ("generation_config.json", {"eos_token_id": "x"}, r"eos_token_id is 'x'"),
        (
            "generation_config.json",
            {"repetition_penalty": "strong"},
            r"repetition_penalty is 'strong', expected a float",
        ),
        ("preprocessor_config.json", {"resize_rule": "any"}, r"resize_rule is 'any'"),
        (
            "preprocessor_config.json",
            {"patch_stride": 14},
            r"patch_stride is 14, but config.json says",
        ),
        ("preprocessor_config.json", {"image_mean": [0.5]}, r"image_mean is \[0.5\]"),
        ("preprocessor_config.json", {"max_size": "big"}, r"max_size is 'big'"),
        ("preprocessor_config.json", {"exif_rotation": "no"}, r"exif_rotation is 'no'"),
    ],
)
def test_wrong_fields_are_named(
    copy: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit(copy / file, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_release(copy)


def test_missing_and_broken_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no released folder: config.json not found"):
        read_release(tmp_path / "none")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read as JSON"):
        read_release(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json holds a list"):
        read_release(copy)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.self_attn.moe_k_proj.bias"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


def recast(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"no tensor 'model.layers.1.self_attn.moe_k_proj.bias', which config.json asks"),
        (add, r"holds 'model.layers.7.mlp.up_proj.weight', which config.json knows nothing of"),
        (reshape, r"lm_head.weight has shape \[322, 32\], config.json asks for \[323, 32\]"),
        (recast, r"dtype I32 is not one of"),
    ],
)
def test_wrong_tensors_are_named(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Engine.load(copy, device=CPU)


def test_wrong_weight_files_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Engine.load(copy, device=CPU)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        Engine.load(copy, device=CPU)
    (copy / "shard.safetensors").write_bytes(whole)
    index = {"weight_map": {"model.norm.weight": "shard.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard.safetensors disagree about 'lm_head.weight'"):
        Engine.load(copy, device=CPU)
    for content, message in (
        ({"weight_map": {"model.norm.weight": "../shard.safetensors"}}, "is not in its folder"),
        ({"weights": {}}, r"is no index of safetensors files \(KeyError: 'weight_map'\)"),
    ):
        (copy / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            Engine.load(copy, device=CPU)
