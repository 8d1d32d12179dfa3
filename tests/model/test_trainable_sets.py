# SPDX-License-Identifier: Apache-2.0
"""What the five 7B stages train, by name and count, on the meta device, against the official model's own list.

tests/golden/official/stages_7b.json was written by the official classes and the official rule of what is trained
(train.py:521-531 with the flags of scripts/eve); README.md there."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from checkpoints_convert.names import tensor_rules
from megatron_eve.config.recipes import load_recipe
from tests.support.tiny import layout
from tests.support.train_once import run_config

OFFICIAL = json.loads((Path(__file__).parents[1] / "golden/official/stages_7b.json").read_text())
COUNTS = {
    "eve7b_stage1": 15_478_272,
    "eve7b_stage2_1_ld": 6_541_096_448,
    "eve7b_stage2_1_hd": 6_541_096_448,
    "eve7b_stage2_2": 14_156_712_960,
    "eve7b_stage3": 14_156_712_960,
}


def parameters_on_meta(recipe: str) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """In a worker: whether each parameter of the recipe's model is trained, and its shape; no memory is taken."""
    from megatron_eve.model.build import build_model
    from megatron_eve.model.stages import freeze
    from megatron_eve.parallel.groups import init_model_parallel

    config, meta = load_recipe(recipe), torch.device("meta")
    state = dataclasses.replace(init_model_parallel(layout(), seed=0), device=meta)
    with mock.patch.object(torch.cuda, "current_device", return_value=meta), meta:
        (chunk,), _ = build_model(
            run_config(config.model, layout(), train=dict(dtype="bf16")), state=state
        )
    freeze([chunk], trainable=config.stage.trainable)
    assert all(param.is_meta for param in chunk.parameters())
    return {n: (p.requires_grad, tuple(p.shape)) for n, p in chunk.named_parameters()}


def official_shapes(recipe: str) -> tuple[dict[str, list[int]], set[str]]:
    """Every official parameter's shape, and the trained ones, with the layers written out."""
    stage = OFFICIAL["stages"][recipe]
    shapes = OFFICIAL["parameters"][stage["parameters"]]
    layers = load_recipe(recipe).model.num_layers
    trained = {n.format(i=i) for n in stage["trained_names"] for i in range(layers)}
    return {n.format(i=i): shape for n, shape in shapes.items() for i in range(layers)}, trained


@pytest.mark.parametrize("recipe", COUNTS)
def test_a_7b_stage_trains_what_the_official_one_trains(gloo1: Any, recipe: str) -> None:
    (ours,) = gloo1.run(parameters_on_meta, recipe)
    shapes, trained = official_shapes(recipe)
    stage = OFFICIAL["stages"][recipe]
    assert (len(shapes), len(trained)) == (stage["tensors"], stage["trained_tensors"])

    parts = {rule.eve: rule.hf for rule in tensor_rules(load_recipe(recipe).model)}
    assert parts.keys() == ours.keys()
    assert {name for names in parts.values() for name in names} == shapes.keys()
    assert {name for eve, (on, _) in ours.items() if on for name in parts[eve]} == trained
    for eve, (_, shape) in ours.items():
        assert torch.Size(shape).numel() == sum(torch.Size(shapes[n]).numel() for n in parts[eve])

    count = sum(torch.Size(shape).numel() for on, shape in ours.values() if on)
    assert count == stage["trained"] == COUNTS[recipe]
