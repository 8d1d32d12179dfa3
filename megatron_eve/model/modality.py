# SPDX-License-Identifier: Apache-2.0
"""The places of a micro-batch's tokens: the routing that travels with it through every layer.

Legend: T tokens of a pack, S = T/cp of them on this context-parallel rank, R rows of its residual stream (T without
context parallelism; with it a few more that hold no token, model/zigzag.py), V of them vision, h hidden size.
Three orders:
  sequence order   the S tokens, sample after sample; attention's order
  modality order   V vision rows, then R - V text rows; the order of the residual stream without sequence parallelism
  gathered order   what one all-gather over the tensor-parallel group makes of a sequence-parallel residual stream, in
                   which rank r holds V/tp vision rows and (R-V)/tp text rows: [v_0 t_0 v_1 t_1 ...]. With tp = 1 it is
                   modality order.

The last layer feeds only the labelled rows of the output layer. It computes keys and values of all tokens, and after
its attention only the labelled rows (`KeptRows`): the same function and gradients, less work.

The routing extends megatron-core's PackedSeqParams because that is the one per-micro-batch argument which
TransformerBlock hands to every layer and captures for recomputation; nothing of it lives in a module.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeptRows:
    """The rows that the last layer goes on with after its attention: the labelled ones, each modality padded to the
    same number on every tensor-parallel rank. Padding rows come from nowhere (index = number of rows) and feed nothing.
    """

    num_vision: int  # vision rows over all tensor-parallel ranks of a sequence-parallel stream
    num_local_vision: int  # vision rows of this rank's residual stream
    residual: Tensor  # [kept rows of this rank] row of this rank's residual stream
    to_rows: Tensor  # [kept rows] sequence position of each row of the output projection's input


@dataclass(kw_only=True)
class ModalityPackedSeqParams(PackedSeqParams):
    """PackedSeqParams in `thd` format plus the modality routing. All index tensors are int64 on the model's device.
    cu_seqlens and sequence_lengths are those of the whole pack, with context parallelism too."""

    num_vision: int  # V: vision rows of this context-parallel rank
    num_local_vision: int
    """Vision rows of this rank's residual stream: V / tp under sequence parallelism, else V."""
    sequence_lengths: tuple[int, ...]  # of every sample, in sequence order; their sum is T
    to_sequence: Tensor
    """[S] row of the attention projections' output that is token s of the sequence."""
    to_rows: Tensor  # [R] inverse of to_sequence; S for a row without a token
    from_gathered: Tensor | None = None
    """[T] context parallelism: where token t of the whole pack is in the ranks' tokens put in a row."""
    kept: KeptRows | None = None  # for the last layer
    rope_cos: Tensor | None = None  # [S, 1, head_dim], sequence order, in the activations' dtype
    rope_sin: Tensor | None = None  # as rope_cos

    @property
    def has_rows_without_token(self) -> bool:
        """Whether R > S: then going to sequence order and back are no permutations."""
        return self.to_rows.numel() > self.to_sequence.numel()


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


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index.clamp(max=x.shape[0] - 1))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        # One row more takes what belongs to no row: the only index that may occur twice.
        rows = grad.new_zeros(ctx.num_rows + 1, *grad.shape[1:]).index_copy_(0, index, grad)
        return rows[: ctx.num_rows], None


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [m] of `x` [n, ...]; no index below n twice. A row with index n holds some finite values, must feed
    nothing, and sends no gradient back."""
    return _SelectRows.apply(x, index)


def gathered_rows(*, num_tokens: int, num_vision: int, tensor_parallel: int) -> Tensor:
    """Gathered order as a permutation: result[m] = row, in gathered order, of the m-th token in modality order.

    Shapes: -> [num_tokens] int64. Both segments must be multiples of `tensor_parallel` (the packer's align sees to it).
    """
    vision, text = num_vision // tensor_parallel, (num_tokens - num_vision) // tensor_parallel
    rank_start = torch.arange(tensor_parallel).unsqueeze(1) * (vision + text)
    vision_rows = rank_start + torch.arange(vision)
    text_rows = rank_start + vision + torch.arange(text)
    return torch.cat([vision_rows.flatten(), text_rows.flatten()])
