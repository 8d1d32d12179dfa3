# SPDX-License-Identifier: Apache-2.0
"""RMSNorm of the `local` backend, as Qwen2 computes it."""

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Normalises in fp32, casts back to the input's dtype, then multiplies by the weight (EVEv2 modeling_qwen2.py:113).

    Under sequence parallelism each tensor-parallel rank sees its own rows, so the weight's gradient is a partial sum;
    the attribute `sequence_parallel` makes megatron-core's finalize_model_grads add them up."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> the same shape and dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)
