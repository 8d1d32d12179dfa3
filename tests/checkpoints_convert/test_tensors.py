# SPDX-License-Identifier: Apache-2.0
"""Conversion of state dicts: exact inverses, and every misfit refused by name."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from checkpoints_convert.names import tensor_rules, text_twin
from checkpoints_convert.tensors import (
    EveView,
    eve_shape,
    eve_to_hf,
    hf_to_eve,
    merge_qkv,
    split_qkv,
)
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.config.variants import moe_part_from_split
from megatron_eve.errors import CheckpointError
from tests.support.reference_eve import build_reference
from tests.support.tiny import ALL, DENSE, tiny_model

SPLITS = [
    SplitConfig(norm=norm, attention=attention, ffn=ffn)
    for norm, attention, ffn in itertools.product((False, True), repeat=3)
]


def hf_state(model: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Official tensors of a model in which no two values need be equal."""
    return dict(build_reference(model, dtype=dtype).state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: moe_part_from_split(split) or "dense")
def test_both_directions_are_exact_inverses(split: SplitConfig, tied: bool) -> None:
    model = tiny_model(split, tied=tied)
    state = hf_state(model)
    eve = hf_to_eve(state, model)
    assert [*eve] == [rule.eve for rule in tensor_rules(model)]
    assert ("output_layer.weight" in eve) != tied
    assert_same(eve_to_hf(eve, model), state)


def test_every_byte_pattern_survives() -> None:
    """NaN payloads, infinities and signed zeros are bytes like others."""
    model = tiny_model(layers=1)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(
            -(2**15), 2**15, tensor.shape, dtype=torch.int16, generator=generator
        ).view(torch.bfloat16)
        for name, tensor in hf_state(model).items()
    }
    back = eve_to_hf(hf_to_eve(state, model), model)
    for name, tensor in state.items():
        assert torch.equal(back[name].view(torch.int16), tensor.view(torch.int16)), name


def test_qkv_is_interleaved_by_group() -> None:
    """Two groups of two query heads, head dim 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    q, k, v = torch.arange(4.0), torch.arange(10.0, 12.0), torch.arange(20.0, 22.0)
    merged = merge_qkv(q, k, v, num_kv_heads=2)
    assert merged.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, expected in zip(
        split_qkv(merged, num_kv_heads=2, head_dim=1), (q, k, v), strict=True
    ):
        assert torch.equal(part, expected)


def test_zero_biases_stay_zero() -> None:
    model = tiny_model(layers=1)
    state = hf_state(model)
    zeros = {k: torch.zeros_like(v) if k.endswith("_proj.bias") else v for k, v in state.items()}
    eve = hf_to_eve(zeros, model)
    assert not eve["decoder.layers.0.self_attention.linear_qkv.vision.bias"].any()
    assert_same(eve_to_hf(eve, model), zeros)


def test_7b_has_the_official_681_tensors() -> None:
    model = load_recipe("eve7b_stage2_2").model
    rules = tensor_rules(model)
    names = [name for rule in rules for name in rule.hf]
    shapes = [shape for rule in rules for shape in rule.hf_shapes]
    assert len(names) == len(set(names)) == 681
    assert sum(torch.Size(shape).numel() for shape in shapes) == 14_156_712_960
    assert eve_shape(next(r for r in rules if "linear_qkv" in r.eve)) == (4608, 3584)
    assert eve_shape(next(r for r in rules if "linear_fc1" in r.eve)) == (37888, 3584)


def test_vision_names_have_text_twins() -> None:
    names = [name for rule in tensor_rules(tiny_model(ALL)) for name in rule.hf]
    twins = [text_twin(name) for name in names]
    assert {twin for twin in twins if twin} <= set(names)
    assert sum(twin is not None for twin in twins) == 4 * 12


@pytest.mark.parametrize(("rows", "what"), [(64, "padded"), (58, "cut")], ids=["padded", "cut"])
def test_vocabulary_of_another_size(rows: int, what: str) -> None:
    """More rows than the model's are dropped, missing ones are zeros; only when asked for."""
    model = tiny_model(layers=1)
    state = hf_state(dataclasses.replace(model, vocab_size=rows))
    with pytest.raises(
        CheckpointError, match=rf"model.embed_tokens.weight.*\[{rows}, 32\].*--vocab"
    ):
        hf_to_eve(state, model)
    eve = hf_to_eve(state, model, resize_vocabulary=True)
    for name, hf_name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        kept = min(rows, 61)
        assert eve[name].shape == (61, 32)
        assert torch.equal(eve[name][:kept], state[hf_name][:kept])
        assert not eve[name][kept:].any()


def test_old_official_names_are_understood() -> None:
    model = tiny_model(layers=1)
    state = hf_state(model)
    old = dict(state)
    for now, then in (("class_embedding", "start_embedding"), ("split_embedding", "end_embedding")):
        old[f"model.vision_tower.{then}"] = old.pop(f"model.vision_tower.{now}")
    assert_same(hf_to_eve(old, model), hf_to_eve(state, model))
    old["model.vision_tower.class_embedding"] = state["model.vision_tower.class_embedding"]
    with pytest.raises(CheckpointError, match="two names of the same weight"):
        hf_to_eve(old, model)


def test_missing_tensor_is_named() -> None:
    model = tiny_model(layers=1)
    state = hf_state(model)
    del state["model.layers.0.self_attn.moe_k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: .*0\.self_attn\.moe_k_proj\.bias"):
        hf_to_eve(state, model)


def test_left_over_tensor_is_named() -> None:
    """A split checkpoint does not pass for a dense one."""
    state = hf_state(tiny_model(layers=1))
    with pytest.raises(CheckpointError, match=r"has 12 tensors that the model does not: .*moe_"):
        hf_to_eve(state, tiny_model(DENSE, layers=1))


def test_misshapen_tensor_is_named() -> None:
    model = tiny_model(layers=1)
    state = hf_state(model)
    state["model.norm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \[31\].*\[32\]"):
        hf_to_eve(state, model)


def test_misshapen_eve_tensor_is_named() -> None:
    model = tiny_model(layers=1)
    eve = hf_to_eve(hf_state(model), model)
    name = "decoder.layers.0.mlp.linear_fc1.vision.weight"
    eve[name] = eve[name][:-1]
    with pytest.raises(CheckpointError, match=r"fc1.vision.weight' has shape \[95, 32\]"):
        eve_to_hf(eve, model)
    del eve[name]
    with pytest.raises(CheckpointError, match="EveModel checkpoint lacks 1 tensors"):
        eve_to_hf(eve, model)


def test_tied_checkpoint_may_repeat_its_head_but_not_contradict_it() -> None:
    model = tiny_model(layers=1, tied=True)
    state = hf_state(model)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    assert "output_layer.weight" not in hf_to_eve(state, model)
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but 'lm_head.weight'"):
        hf_to_eve(state, model)
    without = {name: tensor for name, tensor in state.items() if "embed_tokens" not in name}
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: model\.embed_tokens\.weight"):
        hf_to_eve(without, model)


def test_a_dry_run_sees_that_a_tied_head_has_another_shape() -> None:
    model = tiny_model(layers=1, tied=True)
    headers = {name: tensor.to("meta") for name, tensor in hf_state(model).items()}
    headers["lm_head.weight"] = headers["model.embed_tokens.weight"]
    EveView(headers, model, resize_vocabulary=False)
    headers["lm_head.weight"] = headers["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from"):
        EveView(headers, model, resize_vocabulary=False)
