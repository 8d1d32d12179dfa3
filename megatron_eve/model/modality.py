# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of a micro-batch are: the routing that travels with it through every layer.

Legend: T tokens of a pack, V of them vision (padding included), h hidden size. Three orders of the T rows:
  sequence order   sample after sample; attention's order
  modality order   V vision rows, then T - V text rows; the order of the residual stream without sequence parallelism
  gathered order   what one all-gather over the tensor-parallel group makes of a sequence-parallel residual stream, in
                   which rank r holds V/tp vision rows and (T-V)/tp text rows: [v_0 t_0 v_1 t_1 ...]. With tp = 1 it is
                   modality order.

The routing extends megatron-core's PackedSeqParams because that is the one per-micro-batch argument which
TransformerBlock hands to every layer and captures for recomputation; nothing of it lives in a module.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class ModalityPackedSeqParams(PackedSeqParams):
    """PackedSeqParams in `thd` format plus the modality routing. All index tensors are int64 on the model's device."""

    num_vision: int = 0  # V: vision rows of the whole pack
    num_local_vision: int = (
        0  # vision rows of this rank's residual stream: V / tp under sequence parallelism, else V
    )
    sequence_lengths: tuple[int, ...] = ()  # of every sample, in sequence order; their sum is T
    to_sequence: Tensor | None = (
        None  # [T] row of the attention projections' output that is token s of the sequence
    )
    to_rows: Tensor | None = None  # [T] inverse of to_sequence
    rope_cos: Tensor | None = None  # [T, 1, head_dim], sequence order, in the activations' dtype
    rope_sin: Tensor | None = None  # as rope_cos


class _PermuteRows(torch.autograd.Function):
    """y[i] = x[index[i]] for a permutation; the backward is the inverse gather, not an index_add."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def permute_rows(x: Tensor, *, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of `x` [T, ...] in the order `index` [T] gives; `inverse` [T] is the inverse permutation."""
    return _PermuteRows.apply(x, index, inverse)


def gathered_rows(*, num_tokens: int, num_vision: int, tensor_parallel: int) -> Tensor:
    """Gathered order as a permutation: result[m] = row, in gathered order, of the m-th token in modality order.

    Shapes: -> [num_tokens] int64. Both segments must be multiples of `tensor_parallel` (the packer's align sees to it).
    """
    vision, text = num_vision // tensor_parallel, (num_tokens - num_vision) // tensor_parallel
    rank_start = torch.arange(tensor_parallel).unsqueeze(1) * (vision + text)
    vision_rows = rank_start + torch.arange(vision)
    text_rows = rank_start + vision + torch.arange(text)
    return torch.cat([vision_rows.flatten(), text_rows.flatten()])
