# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a pack: index arithmetic on the host, then one copy to the device.

Legend: T tokens of the pack, S = T/cp of them on this context-parallel rank, R rows of its residual stream in modality
order, V of them vision, P patches of this rank, L labelled rows of this context-parallel rank (padded to at least one).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_eve.data.sample import VISION_CLS, VISION_PAD, VISION_PATCH, VISION_SPL, Pack
from megatron_eve.model.modality import KeptRows, ModalityPackedSeqParams, gathered_rows
from megatron_eve.model.zigzag import zigzag_positions


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What EveModel.forward takes. Tensors on the model's device; embeddings' inputs only where they are needed."""

    routing: ModalityPackedSeqParams
    position_ids: Tensor  # [S] int64, sequence order
    text_ids: Tensor  # [R - V] int64
    patches: Tensor  # [P, d * d, 3 * p * p] uint8: the patches among this rank's vision rows; empty after stage one
    vision_sources: Tensor  # [V or V/tp] int64, see PatchEmbedding.forward
    label_rows: Tensor  # [L] int64, rows of the last layer's gathered output
    label_targets: Tensor  # [L] int64
    label_weights: Tensor  # [L] float32: of each target in the loss, 0 for a padding row
    num_labels: int  # real targets among the L rows


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """The place of a rank in its model-parallel group."""

    tp_rank: int = 0
    tp_size: int = 1
    sequence_parallel: bool = False
    cp_rank: int = 0
    cp_size: int = 1

    @property
    def shards(self) -> int:
        """Parts of the residual stream within a tensor-parallel group."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def shard(self) -> int:
        return self.tp_rank if self.sequence_parallel else 0


def stream_rows(pack_tokens: int, *, cp_size: int, align: int) -> int:
    """R: rows of a context-parallel rank's residual stream over all tensor-parallel ranks, the same for every pack.

    Without context parallelism every row holds a token, because the packer aligns both segments. A zigzag part of a
    pack has any number of vision tokens; one `align` of rows more leaves room to align both."""
    return pack_tokens if cp_size == 1 else pack_tokens // cp_size + align


def micro_batch(
    pack: Pack,
    *,
    place: RankPlace,
    split_attention: bool,
    align: int,
    device: torch.device,
    label_weights: Tensor | None = None,
) -> MicroBatch:
    """The part of `pack` that the rank at `place` computes on.

    `label_weights` [labels of the pack] float32, see training/loss.py; None: each weighs 1. `align`: both segments, the
    rows that the last layer keeps and the labelled rows are padded to multiples of it, so that kernels see few
    different shapes and never none.
    """
    if label_weights is None:
        label_weights = torch.ones(pack.label_rows.numel())
    tokens = _local_tokens(pack, place=place, align=align, label_weights=label_weights)
    kept_rows, kept = _kept_rows(
        tokens, place=place, split_attention=split_attention, align=align, device=device
    )
    rows, targets, weights = _padded_labels(tokens, kept_rows, align=align)
    patches, sources = _vision_inputs(pack, tokens, place=place)
    return MicroBatch(
        routing=_routing(
            pack, tokens, kept, place=place, split_attention=split_attention, device=device
        ),
        position_ids=pack.position_ids[tokens.positions].to(device),
        text_ids=tokens.text_ids.to(device),
        patches=patches.to(device),
        vision_sources=sources.to(device),
        label_rows=rows.to(device),
        label_targets=targets.to(device),
        label_weights=weights.to(device),
        num_labels=tokens.label_targets.numel(),
    )


@dataclass(frozen=True, slots=True)
class ExecutedRows:
    """How many rows one context-parallel rank computes on, over its tensor-parallel ranks."""

    vision: int
    text: int
    kept_vision: int  # after the last layer's attention
    kept_text: int
    labels: int  # of the output layer


def executed_rows(pack: Pack, *, cp_size: int, shards: int, align: int) -> list[ExecutedRows]:
    """One entry for each context-parallel rank: the rows of micro_batch with `shards` parts of the residual stream."""
    ranks = []
    for cp_rank in range(cp_size):
        place = RankPlace(cp_rank=cp_rank, cp_size=cp_size)
        tokens = _local_tokens(
            pack, place=place, align=align, label_weights=torch.ones(pack.label_rows.numel())
        )
        num_rows, num_vision = tokens.order.numel(), tokens.num_vision
        kept_vision, kept_text = (
            torch.cat(
                _labelled_by_shard(tokens, begin=begin, end=end, shards=shards, align=align)
            ).numel()
            for begin, end in ((0, num_vision), (num_vision, num_rows))
        )
        ranks.append(
            ExecutedRows(
                vision=num_vision,
                text=num_rows - num_vision,
                kept_vision=kept_vision,
                kept_text=kept_text,
                labels=max(align, -(-tokens.label_rows.numel() // align) * align),
            )
        )
    return ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class _LocalTokens:
    """A context-parallel rank's share of a pack; modality order as in Pack, over its own rows."""

    lengths: tuple[int, ...]  # of the pack's samples
    positions: Tensor  # [S] position in the pack of each token
    num_vision: int  # V
    order: Tensor  # [R] which of the S tokens is in each row; S where none is
    text_ids: Tensor  # [R - V]; 0 where no token is
    vision_kind: Tensor  # [V]
    patch_numbers: Tensor
    """[patches] number of each patch among the pack's, in the order of the rows."""
    label_rows: Tensor  # [labels] rows in modality order
    label_targets: Tensor  # [labels]
    label_weights: Tensor  # [labels] float32


def _local_tokens(
    pack: Pack, *, place: RankPlace, align: int, label_weights: Tensor
) -> _LocalTokens:
    lengths = tuple(pack.cu_seqlens.diff().tolist())
    numbers = (pack.vision_kind == VISION_PATCH).cumsum(0) - 1
    if place.cp_size == 1:
        return _LocalTokens(
            lengths=lengths,
            positions=torch.arange(pack.num_tokens),
            num_vision=pack.num_vision,
            order=pack.modality_order,
            text_ids=pack.text_ids,
            vision_kind=pack.vision_kind,
            patch_numbers=numbers[pack.vision_kind == VISION_PATCH],
            label_rows=pack.label_rows,
            label_targets=pack.label_targets,
            label_weights=label_weights,
        )
    positions = zigzag_positions(lengths, cp_rank=place.cp_rank, cp_size=place.cp_size)
    row_of_position = torch.empty_like(pack.modality_order)
    row_of_position[pack.modality_order] = torch.arange(pack.num_tokens)
    pack_rows, by_row = row_of_position[positions].sort()  # this rank's rows of the pack's order
    is_vision = pack_rows < pack.num_vision
    held, total = int(is_vision.sum()), positions.numel()
    num_vision = max(align, -(-held // align) * align)
    num_rows = stream_rows(pack.num_tokens, cp_size=place.cp_size, align=align)
    slots = torch.cat([torch.arange(held), num_vision + torch.arange(total - held)])
    order = torch.full((num_rows,), total).index_copy_(0, slots, by_row)
    text_ids = torch.zeros(num_rows - num_vision, dtype=torch.int64)
    text_ids[: total - held] = pack.text_ids[pack_rows[held:] - pack.num_vision]
    kind = torch.full((num_vision,), VISION_PAD, dtype=torch.uint8)
    kind[:held] = pack.vision_kind[pack_rows[:held]]
    slot_of_row = torch.full((pack.num_tokens,), -1).index_copy_(0, pack_rows, slots)
    label_slots = slot_of_row[pack.label_rows]
    return _LocalTokens(
        lengths=lengths,
        positions=positions,
        num_vision=num_vision,
        order=order,
        text_ids=text_ids,
        vision_kind=kind,
        patch_numbers=numbers[pack_rows[:held]][kind[:held] == VISION_PATCH],
        label_rows=label_slots[label_slots >= 0],
        label_targets=pack.label_targets[label_slots >= 0],
        label_weights=label_weights[label_slots >= 0],
    )


def _routing(
    pack: Pack,
    tokens: _LocalTokens,
    kept: KeptRows,
    *,
    place: RankPlace,
    split_attention: bool,
    device: torch.device,
) -> ModalityPackedSeqParams:
    # Partitioned attention projections gather each segment by itself: modality order. Others gather the whole stream.
    num_rows, num_tokens = tokens.order.numel(), tokens.positions.numel()
    rows = torch.arange(num_rows)
    if not split_attention:
        rows = gathered_rows(
            num_tokens=num_rows, num_vision=tokens.num_vision, tensor_parallel=place.shards
        )
    to_rows = torch.empty_like(rows)
    to_rows[rows] = tokens.order
    holds_token = tokens.order < num_tokens
    to_sequence = torch.empty(num_tokens, dtype=torch.int64)
    to_sequence[tokens.order[holds_token]] = rows[holds_token]
    cu_seqlens = pack.cu_seqlens.to(device)
    return ModalityPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=pack.max_seqlen,
        max_seqlen_kv=pack.max_seqlen,
        num_vision=tokens.num_vision,
        num_local_vision=tokens.num_vision // place.shards,
        sequence_lengths=tokens.lengths,
        to_sequence=to_sequence.to(device),
        to_rows=to_rows.to(device),
        from_gathered=_from_gathered(tokens.lengths, place=place, device=device),
        kept=kept,
    )


def _from_gathered(
    lengths: tuple[int, ...], *, place: RankPlace, device: torch.device
) -> Tensor | None:
    if place.cp_size == 1:
        return None
    held = [
        zigzag_positions(lengths, cp_rank=rank, cp_size=place.cp_size)
        for rank in range(place.cp_size)
    ]
    return torch.cat(held).argsort().to(device)


def _kept_rows(
    tokens: _LocalTokens,
    *,
    place: RankPlace,
    split_attention: bool,
    align: int,
    device: torch.device,
) -> tuple[Tensor, KeptRows]:
    """([kept rows over all shards] row in modality order of each, in gathered order, R for padding; the KeptRows)."""
    num_rows, num_vision, shards = tokens.order.numel(), tokens.num_vision, place.shards
    vision = _labelled_by_shard(tokens, begin=0, end=num_vision, shards=shards, align=align)
    text = _labelled_by_shard(tokens, begin=num_vision, end=num_rows, shards=shards, align=align)
    gathered = torch.cat([torch.cat(pair) for pair in zip(vision, text, strict=True)])
    row_of_local = torch.cat(
        [
            torch.arange(num_vision).chunk(shards)[place.shard],
            torch.arange(num_vision, num_rows).chunk(shards)[place.shard],
        ]
    )
    local_of_row = torch.full((num_rows + 1,), row_of_local.numel())
    local_of_row[row_of_local] = torch.arange(row_of_local.numel())
    token_of_row = torch.cat([tokens.order, torch.tensor([tokens.positions.numel()])])
    projected = torch.cat([*vision, *text]) if split_attention else gathered
    return gathered, KeptRows(
        num_vision=sum(rows.numel() for rows in vision),
        num_local_vision=vision[place.shard].numel(),
        residual=local_of_row[torch.cat([vision[place.shard], text[place.shard]])].to(device),
        to_rows=token_of_row[projected].to(device),
    )


def _labelled_by_shard(
    tokens: _LocalTokens, *, begin: int, end: int, shards: int, align: int
) -> list[Tensor]:
    """The labelled rows of one segment by shard of the residual stream, padded with R to one length."""
    size, unit = (end - begin) // shards, max(align // shards, 1)
    rows = tokens.label_rows
    found = [
        rows[(rows >= first) & (rows < first + size)]
        for first in range(begin, begin + shards * size, size)
    ]
    longest = max(1, *(rows.numel() for rows in found))
    padded = -(-longest // unit) * unit
    missing = tokens.order.numel()
    return [F.pad(rows, (0, padded - rows.numel()), value=missing) for rows in found]


def _padded_labels(
    tokens: _LocalTokens, kept_rows: Tensor, *, align: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of the last layer's gathered output, targets, weights) of the labels."""
    count = tokens.label_rows.numel()
    place_of_row = torch.zeros(tokens.order.numel() + 1, dtype=torch.int64)
    place_of_row[kept_rows] = torch.arange(kept_rows.numel())
    padding = max(align, -(-count // align) * align) - count
    rows = F.pad(place_of_row[tokens.label_rows], (0, padding))
    targets = F.pad(tokens.label_targets, (0, padding))
    weights = F.pad(tokens.label_weights, (0, padding))
    return rows, targets, weights


def _vision_inputs(pack: Pack, tokens: _LocalTokens, *, place: RankPlace) -> tuple[Tensor, Tensor]:
    if pack.patches is None:  # not the first pipeline stage
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    size = tokens.num_vision // place.shards
    kind = tokens.vision_kind[place.shard * size : (place.shard + 1) * size]
    is_patch = kind == VISION_PATCH
    first = int((tokens.vision_kind[: place.shard * size] == VISION_PATCH).sum())
    count = int(is_patch.sum())
    sources = torch.empty(size, dtype=torch.int64)
    sources[is_patch] = torch.arange(count)
    for offset, special in enumerate((VISION_CLS, VISION_SPL, VISION_PAD)):
        sources[kind == special] = count + offset
    return pack.patches[tokens.patch_numbers[first : first + count]], sources
