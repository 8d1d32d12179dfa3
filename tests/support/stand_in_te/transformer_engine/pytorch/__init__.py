# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

from transformer_engine.pytorch import distributed, fp8, ops, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast
from transformer_engine.pytorch.module import GroupedLinear, LayerNormLinear, Linear, RMSNorm

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "fp8_autocast",
    "ops",
    "tensor",
]
