# SPDX-License-Identifier: Apache-2.0
"""From the rows of the QKV projection to q, k, v in sequence order with rotary positions, in one pass over memory.

Unfused this is a gather of all rows, a split, and four elementwise passes over q and k. Here every token is read once
and written once; the backward does the same in the other direction, also by gathering. Rotations are computed in fp32
and rounded once; the unfused form in BF16 rounds three times, so the two agree to BF16 rounding and not to bits.
`permute_rope_reference` is the twin in PyTorch. Never run on a GPU yet, see docs/gpu.md; tests run it in Triton's
interpreter and compile it for compute capabilities 8.0 and 9.0.

Legend: R rows of the projections' output, S tokens in sequence order, G key/value groups of this rank with P query
heads each, D head dim. A row is G times (P query heads, one key, one value) of D values: megatron-core's interleave.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    mixed, to_sequence, cos, sin, query, key, value,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program a (token, group): P query heads, the key and the value."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    row = tl.load(to_sequence + token)
    lane = tl.arange(0, BLOCK_HALF)
    inside = lane < HALF
    angle = token * 2 * HALF + lane
    c_low = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c_high = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    s_low = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s_high = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    source = mixed + (row * GROUPS + group) * (PER_GROUP + 2) * 2 * HALF + lane
    for head in tl.static_range(PER_GROUP + 1):
        if head < PER_GROUP:
            target = query + (token * GROUPS * PER_GROUP + group * PER_GROUP + head) * 2 * HALF
        else:
            target = key + (token * GROUPS + group) * 2 * HALF
        low = tl.load(source + head * 2 * HALF, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(source + head * 2 * HALF + HALF, mask=inside, other=0.0).to(tl.float32)
        kind = target.dtype.element_ty
        tl.store(target + lane, (low * c_low - high * s_low).to(kind), mask=inside)
        tl.store(target + lane + HALF, (high * c_high + low * s_high).to(kind), mask=inside)
    source += (PER_GROUP + 1) * 2 * HALF
    target = value + (token * GROUPS + group) * 2 * HALF + lane
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=inside)
    tl.store(target + HALF, tl.load(source + HALF, mask=inside, other=0.0), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    d_query, d_key, d_value, to_rows, cos, sin, d_mixed, num_tokens,
    GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program a (row, group); a row that holds no token (to_rows = S) gets zeros."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    token = tl.load(to_rows + row)
    lane = tl.arange(0, BLOCK_HALF)
    inside = lane < HALF
    held = inside & (token < num_tokens)
    angle = token * 2 * HALF + lane
    c_low = tl.load(cos + angle, mask=held, other=0.0).to(tl.float32)
    c_high = tl.load(cos + angle + HALF, mask=held, other=0.0).to(tl.float32)
    s_low = tl.load(sin + angle, mask=held, other=0.0).to(tl.float32)
    s_high = tl.load(sin + angle + HALF, mask=held, other=0.0).to(tl.float32)
    target = d_mixed + (row * GROUPS + group) * (PER_GROUP + 2) * 2 * HALF + lane
    kind = d_mixed.dtype.element_ty
    for head in tl.static_range(PER_GROUP + 1):
        if head < PER_GROUP:
            source = d_query + (token * GROUPS * PER_GROUP + group * PER_GROUP + head) * 2 * HALF
        else:
            source = d_key + (token * GROUPS + group) * 2 * HALF
        low = tl.load(source + lane, mask=held, other=0.0).to(tl.float32)
        high = tl.load(source + lane + HALF, mask=held, other=0.0).to(tl.float32)
        at = target + head * 2 * HALF
        tl.store(at, (low * c_low + high * s_high).to(kind), mask=inside)
        tl.store(at + HALF, (high * c_high - low * s_low).to(kind), mask=inside)
    target += (PER_GROUP + 1) * 2 * HALF
    source = d_value + (token * GROUPS + group) * 2 * HALF + lane
    tl.store(target, tl.load(source, mask=held, other=0.0), mask=inside)
    tl.store(target + HALF, tl.load(source + HALF, mask=held, other=0.0), mask=inside)


class _PermuteRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, to_sequence, to_rows, cos, sin, groups, per_group):  # type: ignore[no-untyped-def]
        tokens, dim = to_sequence.numel(), mixed.shape[1] // (groups * (per_group + 2))
        query = mixed.new_empty(tokens, groups * per_group, dim)
        key, value = (mixed.new_empty(tokens, groups, dim) for _ in range(2))
        shape = dict(GROUPS=groups, PER_GROUP=per_group, HALF=dim // 2)
        shape["BLOCK_HALF"] = triton.next_power_of_2(dim // 2)
        _forward_kernel[(tokens, groups)](
            mixed, to_sequence, cos, sin, query, key, value, num_warps=1, **shape
        )
        ctx.save_for_backward(to_rows, cos, sin)
        ctx.tokens, ctx.rows, ctx.width, ctx.shape = tokens, mixed.shape[0], mixed.shape[1], shape
        return query, key, value

    @staticmethod
    def backward(ctx, d_query, d_key, d_value):  # type: ignore[no-untyped-def]
        to_rows, cos, sin = ctx.saved_tensors
        d_query, d_key, d_value = (d.contiguous() for d in (d_query, d_key, d_value))
        d_mixed = d_query.new_empty(ctx.rows, ctx.width)
        _backward_kernel[(ctx.rows, ctx.shape["GROUPS"])](
            d_query, d_key, d_value, to_rows, cos, sin, d_mixed, ctx.tokens,
            num_warps=1, **ctx.shape,
        )  # fmt: skip
        return d_mixed, None, None, None, None, None, None


def permute_rope(
    mixed: Tensor,
    *,
    to_sequence: Tensor,
    to_rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    groups: int,
    per_group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in sequence order, q and k rotated.

    Shapes: mixed [R, G * (P + 2) * D]; to_sequence [S] and to_rows [R] int64 as in ModalityPackedSeqParams; cos and sin
    [S, 1, D] -> [S, G * P, D], [S, G, D], [S, G, D] in mixed's dtype.
    """
    return _PermuteRope.apply(
        mixed.contiguous(),
        to_sequence,
        to_rows,
        cos.contiguous(),
        sin.contiguous(),
        groups,
        per_group,
    )


def permute_rope_reference(
    mixed: Tensor, *, to_sequence: Tensor, cos: Tensor, sin: Tensor, groups: int, per_group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch, with rotations in fp32 at least; autograd makes its gradient."""
    dim = mixed.shape[1] // (groups * (per_group + 2))
    heads = mixed[to_sequence].view(-1, groups, per_group + 2, dim)
    query, key, value = heads.split([per_group, 1, 1], dim=2)

    def rotated(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        low, high = wide.chunk(2, dim=-1)
        turned = wide * cos.to(wide.dtype) + torch.cat([-high, low], dim=-1) * sin.to(wide.dtype)
        return turned.to(x.dtype)

    return rotated(query.flatten(1, 2)), rotated(key.squeeze(2)), value.squeeze(2)
