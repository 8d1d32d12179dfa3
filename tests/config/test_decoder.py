# SPDX-License-Identifier: Apache-2.0
"""The decoder's table beside a model that was written without it: every tensor, its shape, its group, all of them."""

from dataclasses import replace

import pytest

from checkpoints_convert.names import tensor_rules
from megatron_eve.config.decoder import decoder_layer, patch_convolutions
from megatron_eve.config.schema import ModelConfig
from megatron_eve.config.sizes import parameter_counts
from megatron_eve.config.variants import VARIANTS
from tests.support.reference_eve import build_reference
from tests.support.tiny import tiny_model

MODELS = {
    **{name: tiny_model(split, layers=2) for name, split in VARIANTS.items()},
    "tied": tiny_model(layers=3, tied=True),
    "other widths": replace(tiny_model(layers=2), ffn_hidden_size=36, patch_embed_dim=24),
    "wider than its heads": replace(tiny_model(layers=2), hidden_size=40),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_table_is_the_plain_models(model: ModelConfig) -> None:
    """Names and shapes of a release, and the number of parameters of each trainable group."""
    found = {name: tuple(t.shape) for name, t in build_reference(model).named_parameters()}
    expected = {
        name: shape
        for rule in tensor_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    assert found == expected
    counts = dict.fromkeys(("patch_embedding", "vision", "text"), 0)
    for name, parameter in build_reference(model).named_parameters():
        group = "patch_embedding" if "vision_tower" in name else "vision"
        counts[group if "moe_" in name or "vision_tower" in name else "text"] += parameter.numel()
    assert parameter_counts(model) == counts


def test_what_tensor_parallelism_cuts_adds_up() -> None:
    layer = decoder_layer(tiny_model())
    for linear in layer.linears:
        inputs, outputs = linear.on_rank(2)
        assert 2 * inputs * outputs == linear.weights, linear.name
    assert [linear.name.rpartition("_")[2] for linear in layer.linears] == [
        "qkv",
        "proj",
        "fc1",
        "fc2",
    ]
    assert layer.qkv.outputs == layer.query_width + 2 * layer.key_width


def test_windows_of_a_token_cover_its_pixels() -> None:
    model = tiny_model()
    first, second = patch_convolutions(model)
    pixels = first.windows * first.inputs[1] * first.inputs[2]
    assert pixels == model.pixels_per_token**2
    assert (second.windows, second.inputs[0]) == (1, first.outputs)
