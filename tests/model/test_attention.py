# SPDX-License-Identifier: Apache-2.0
"""The core attention of the local backend keeps memory linear in the pack."""

import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eve.config.megatron import transformer_config

from megatron_eve.model.attention import VarlenSdpa  # isort: skip  (sets up the CPU path)
from megatron.core.transformer.enums import AttnMaskType

from tests.support.tiny import layout, tiny_model


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return result


def attention() -> VarlenSdpa:
    config = transformer_config(tiny_model(), parallel=layout(), dtype="fp32")
    return VarlenSdpa(config, 1, AttnMaskType.padding_causal, "self")


def largest_result(tokens: int) -> int:
    """Forward and backward over one sample, the worst case: kernels that keep scores make a [heads, T, T]."""
    core = attention()
    query = torch.randn(tokens, 4, 8, requires_grad=True)
    key, value = (torch.randn(tokens, 2, 8, requires_grad=True) for _ in range(2))
    with LargestResult() as largest:
        out = core(
            query,
            key,
            value,
            None,
            attn_mask_type=AttnMaskType.padding_causal,
            packed_seq_params=types.SimpleNamespace(sequence_lengths=(tokens,)),
        )
        out.sum().backward()
    return largest.elements


def test_memory_is_linear_in_the_pack() -> None:
    """The largest tensor is q, the output or their gradients."""
    assert largest_result(512) == 512 * 4 * 8
    assert largest_result(2048) == 2048 * 4 * 8


def test_other_masks_are_refused() -> None:
    q = torch.zeros(4, 1, 8)
    routing = types.SimpleNamespace(sequence_lengths=(4,))
    with pytest.raises(ValueError, match="causal attention within each sample"):
        attention()(q, q, q, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=routing)
