# SPDX-License-Identifier: Apache-2.0
"""The reference model against the official code's own numbers.

The golden file was written by running baaivision/EVE at the commit it names on the weights of
`build_reference(config, seed=7)` and the sample below.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron_eve.config.schema import ModelConfig, SplitConfig
from tests.support.reference_eve import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    ReferenceSample,
    batch_loss,
    build_reference,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/official_eve_logits.json").read_text())


def model_config(moe_part: str | None) -> ModelConfig:
    """The tiny model of the golden file; the substring rule is the official one."""
    part = moe_part or ""
    split = SplitConfig(norm="layernorm" in part, attention="self_attn" in part, ffn="mlp" in part)
    return ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=11,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=False,
        init_std=0.02,
        split=split,
        patch_stride=16,
        dense_stride=2,
        patch_embed_dim=16,
    )


def golden_sample() -> ReferenceSample:
    """Two images of different shapes between text, closed-form pixels."""
    images = tuple(
        torch.linspace(-1.5, 2, 3 * h * w).sin().mul(1.3).reshape(3, h, w)
        for h, w in ((32, 64), (64, 32))
    )
    ids = torch.tensor([3, IMAGE_PLACEHOLDER, 5, 1, IMAGE_PLACEHOLDER, 2, 7])
    labels = torch.tensor([IGNORE, IGNORE, 5, 1, IGNORE, 2, 7])
    return ReferenceSample(ids, images, labels)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: str(case["moe_part"]))
def test_equals_official_code(case: dict) -> None:
    eve = build_reference(model_config(case["moe_part"]), seed=7)
    with torch.no_grad():
        output = eve(golden_sample())
    torch.testing.assert_close(output.logits, torch.tensor(case["logits"]), rtol=1e-5, atol=2e-6)
    assert output.loss_sum.item() / output.num_targets == pytest.approx(case["loss"], rel=1e-6)


def test_loss_normalizations_differ_on_unequal_microbatches() -> None:
    eve = build_reference(model_config("mlp"), dtype=torch.float64)
    long, short = golden_sample(), ReferenceSample(torch.tensor([1, 2]))
    with torch.no_grad():
        a, b = eve(long), eve(short)
        total = batch_loss(eve, [[long], [short]])
        mean = batch_loss(eve, [[long], [short]], normalization="microbatch_mean")
    assert (a.num_targets, b.num_targets) == (4, 1)
    torch.testing.assert_close(total, (a.loss_sum + b.loss_sum) / 5)
    torch.testing.assert_close(mean, (a.loss_sum / 4 + b.loss_sum) / 2)
