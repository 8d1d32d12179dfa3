# SPDX-License-Identifier: Apache-2.0
"""Splits and the official `moe_part` strings."""

import itertools

import pytest

from megatron_eve.config.schema import SplitConfig
from megatron_eve.config.variants import VARIANTS, moe_part_from_split, split_from_moe_part
from megatron_eve.errors import ConfigError


@pytest.mark.parametrize(
    ("variant", "moe_part"),
    [
        ("eve-v1.0", None),
        ("eve-v1.5", "mlp"),
        ("norm-only", "layernorm"),
        ("eve-v2.0", "layernorm-self_attn-mlp"),
    ],
)
def test_variants_have_their_official_spelling(variant: str, moe_part: str | None) -> None:
    assert moe_part_from_split(VARIANTS[variant]) == moe_part
    assert split_from_moe_part(moe_part) == VARIANTS[variant]


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=3)))
def test_every_split_survives_the_round_trip(chosen: tuple[bool, bool, bool]) -> None:
    split = SplitConfig(norm=chosen[0], attention=chosen[1], ffn=chosen[2])
    assert split_from_moe_part(moe_part_from_split(split)) == split


def test_order_of_parts_does_not_matter() -> None:
    assert split_from_moe_part("mlp-layernorm-self_attn") == VARIANTS["eve-v2.0"]


@pytest.mark.parametrize("moe_part", ["", "mlp-", "layer_norm", "self_attn-moe"])
def test_unknown_part_is_refused(moe_part: str) -> None:
    with pytest.raises(ConfigError, match="expected layernorm, self_attn and mlp joined by '-'"):
        split_from_moe_part(moe_part)
