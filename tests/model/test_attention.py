# SPDX-License-Identifier: Apache-2.0
"""The core attention of the local backend keeps memory linear in the pack."""

import resource
import types

import pytest
import torch

from megatron_eve.config.megatron import transformer_config

from megatron_eve.model.attention import VarlenSdpa  # isort: skip  (sets up the CPU path)
from megatron.core.transformer.enums import AttnMaskType

from tests.support.tiny import layout, tiny_model

TOKENS = 8192


def attention() -> VarlenSdpa:
    config = transformer_config(tiny_model(), parallel=layout(), dtype="fp32")
    return VarlenSdpa(config, 1, AttnMaskType.padding_causal, "self")


def peak_growth_mib() -> float:
    """Forward and backward over one sample of 8,192 tokens: a T x T matrix of four heads would take 1 GiB."""
    core = attention()
    query = torch.randn(TOKENS, 4, 8, requires_grad=True)
    key, value = (torch.randn(TOKENS, 2, 8, requires_grad=True) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = core(
        query,
        key,
        value,
        None,
        attn_mask_type=AttnMaskType.padding_causal,
        packed_seq_params=types.SimpleNamespace(sequence_lengths=(TOKENS,)),
    )
    out.sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_memory_is_linear_in_the_pack(gloo1):  # type: ignore[no-untyped-def]
    (growth,) = gloo1.run(peak_growth_mib)
    assert growth < 200


def test_other_masks_are_refused() -> None:
    q = torch.zeros(4, 1, 8)
    routing = types.SimpleNamespace(sequence_lengths=(4,))
    with pytest.raises(ValueError, match="causal attention within each sample"):
        attention()(q, q, q, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=routing)
