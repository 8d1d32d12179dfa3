# SPDX-License-Identifier: Apache-2.0
"""One rank's part of a pack: index arithmetic on the host, then one copy to the device.

Legend: T tokens of the pack, V vision rows, tp tensor-parallel size, P_r patches of this rank, L labelled rows
(padded to at least one), R = V/tp vision rows of this rank under sequence parallelism, else V.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eve.data.sample import VISION_CLS, VISION_PAD, VISION_PATCH, VISION_SPL, Pack
from megatron_eve.model.modality import ModalityPackedSeqParams, gathered_rows


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What EveModel.forward takes. Tensors on the model's device; embeddings' inputs only where they are needed."""

    routing: ModalityPackedSeqParams
    position_ids: Tensor  # [T] int64, sequence order
    text_ids: Tensor  # [T - V] int64
    patches: Tensor  # [P_r, d * d, 3 * p * p] uint8: the patches among this rank's vision rows; empty after stage one
    vision_sources: Tensor  # [R] int64, see PatchEmbedding.forward
    label_rows: Tensor  # [L] int64, rows of the gathered hidden states
    label_targets: Tensor  # [L] int64
    label_weights: Tensor  # [L] float32: 1 for a target, 0 for a padding row
    num_labels: int  # real targets among the L rows


def micro_batch(
    pack: Pack,
    *,
    tp_rank: int,
    tp_size: int,
    sequence_parallel: bool,
    split_attention: bool,
    label_multiple: int,
    device: torch.device,
) -> MicroBatch:
    """The part of `pack` that tensor-parallel rank `tp_rank` computes on.

    `label_multiple`: labelled rows are padded to a multiple of it, so that the output layer sees few different shapes
    and never none.
    """
    shards = tp_size if sequence_parallel else 1
    gathered = gathered_rows(
        num_tokens=pack.num_tokens, num_vision=pack.num_vision, tensor_parallel=shards
    )
    rows, targets, weights = _padded_labels(pack, gathered, multiple=label_multiple)
    patches, sources = _vision_inputs(
        pack, shard=tp_rank if sequence_parallel else 0, shards=shards
    )
    # Partitioned attention projections gather each segment by itself: modality order. Others gather the whole stream.
    routing = _routing(
        pack, row_of_modality=None if split_attention else gathered, shards=shards, device=device
    )
    return MicroBatch(
        routing=routing,
        position_ids=pack.position_ids.to(device),
        text_ids=pack.text_ids.to(device),
        patches=patches.to(device),
        vision_sources=sources.to(device),
        label_rows=rows.to(device),
        label_targets=targets.to(device),
        label_weights=weights.to(device),
        num_labels=int(pack.label_rows.numel()),
    )


def _routing(
    pack: Pack, *, row_of_modality: Tensor | None, shards: int, device: torch.device
) -> ModalityPackedSeqParams:
    # modality_order[m] = s and, with sharding, row_of_modality[m] = row; to_sequence[s] = row, to_rows[row] = s
    rows = torch.arange(pack.num_tokens) if row_of_modality is None else row_of_modality
    to_sequence = torch.empty_like(rows)
    to_sequence[pack.modality_order] = rows
    to_rows = torch.empty_like(rows)
    to_rows[rows] = pack.modality_order
    cu_seqlens = pack.cu_seqlens.to(device)
    return ModalityPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=pack.max_seqlen,
        max_seqlen_kv=pack.max_seqlen,
        num_vision=pack.num_vision,
        num_local_vision=pack.num_vision // shards,
        sequence_lengths=tuple(pack.cu_seqlens.diff().tolist()),
        to_sequence=to_sequence.to(device),
        to_rows=to_rows.to(device),
    )


def _padded_labels(pack: Pack, gathered: Tensor, *, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    count = pack.label_rows.numel()
    padding = max(multiple, -(-count // multiple) * multiple) - count
    rows = torch.cat([gathered[pack.label_rows], torch.zeros(padding, dtype=torch.int64)])
    targets = torch.cat([pack.label_targets, torch.zeros(padding, dtype=torch.int64)])
    weights = torch.cat([torch.ones(count), torch.zeros(padding)])
    return rows, targets, weights


def _vision_inputs(pack: Pack, *, shard: int, shards: int) -> tuple[Tensor, Tensor]:
    size = pack.num_vision // shards
    kind = pack.vision_kind[shard * size : (shard + 1) * size]
    if pack.patches is None:  # not the first pipeline stage
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    is_patch = kind == VISION_PATCH
    first = int((pack.vision_kind[: shard * size] == VISION_PATCH).sum())
    count = int(is_patch.sum())
    sources = torch.empty(size, dtype=torch.int64)
    sources[is_patch] = torch.arange(count)
    for offset, special in enumerate((VISION_CLS, VISION_SPL, VISION_PAD)):
        sources[kind == special] = count + offset
    return pack.patches[first : first + count], sources
