# SPDX-License-Identifier: Apache-2.0
"""Self-attention with modality-partitioned projections around one joint causal attention.

Legend: T tokens of the pack, S of them on this context-parallel rank, R rows of its residual stream (modality.py), N
query heads and K key/value heads of this tensor-parallel rank, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_eve.model.modality import (
    KeptRows,
    ModalityPackedSeqParams,
    permute_rows,
    select_rows,
)
from megatron_eve.model.partitioned import apply_partitioned
from megatron_eve.model.zigzag import zigzag_chunks


def rotate_half(x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-rotation layout of HF Qwen2; x [T, heads, D], cos and sin [T, 1, D] in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _to_sequence(rows: Tensor, routing: ModalityPackedSeqParams) -> Tensor:
    """[R, ...] rows of the projections' output -> [S, ...] in sequence order."""
    if routing.has_rows_without_token:
        return select_rows(rows, routing.to_sequence)
    return permute_rows(rows, index=routing.to_sequence, inverse=routing.to_rows)


def _to_rows(tokens: Tensor, routing: ModalityPackedSeqParams) -> Tensor:
    """The way back: [S, ...] -> [R, ...]."""
    if routing.has_rows_without_token:
        return select_rows(tokens, routing.to_rows)
    return permute_rows(tokens, index=routing.to_rows, inverse=routing.to_sequence)


class EveSelfAttention(SelfAttention):
    """megatron-core's SelfAttention with the rows permuted to sequence order for the core attention, and back."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: ModalityPackedSeqParams,
        kept: KeptRows | None = None,
    ) -> Tensor:
        """[rows, 1, h] -> [rows or kept rows, 1, h], rows of this rank's residual stream and in its order."""
        routing = packed_seq_params
        mixed, _ = apply_partitioned(self.linear_qkv, hidden_states, routing.num_local_vision)
        query, key, value = self._to_heads(mixed[:, 0], routing)
        context = self._core(query, key, value, routing).flatten(1)
        if kept is None:
            rows, num_vision = _to_rows(context, routing), routing.num_vision
        else:
            rows, num_vision = select_rows(context, kept.to_rows), kept.num_vision
        out, _ = apply_partitioned(self.linear_proj, rows.unsqueeze(1), num_vision)
        return out

    def _to_heads(
        self, mixed: Tensor, routing: ModalityPackedSeqParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the QKV projection [R, ...] -> q [S, N, D], k and v [S, K, D] in sequence order, q and k rotated."""
        query, key, value = self._split_heads(_to_sequence(mixed, routing))
        assert routing.rope_cos is not None and routing.rope_sin is not None
        query = rotate_half(query, cos=routing.rope_cos, sin=routing.rope_sin)
        key = rotate_half(key, cos=routing.rope_cos, sin=routing.rope_sin)
        return query, key, value

    def _split_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, groups * (q heads per group + 2) * D], megatron's interleave, -> [T, N, D], [T, K, D], [T, K, D]."""
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = self.num_attention_heads_per_partition // groups
        heads = mixed.view(mixed.shape[0], groups, per_group + 2, dim)
        query, key, value = heads.split([per_group, 1, 1], dim=2)
        return query.flatten(1, 2), key.squeeze(2), value.squeeze(2)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, routing: Any) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.core_attention(
                q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=routing
            )

        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(attend, False, query, key, value)
        return attend(query, key, value)


class VarlenSdpa(MegatronModule):
    """Core attention of the `local` backend: one causal scaled_dot_product_attention per sample of the pack.

    Memory is linear in the pack: no mask over the pack, and torch's kernels tile each sample. Under context parallelism
    keys and values of all ranks are gathered and each rank's two chunks of a sample look back from where they end;
    their masks are as large as a chunk times a sample. Takes the arguments of megatron-core's core attentions; refuses
    what it does not compute (dropout, a bias, another mask)."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        if (attention_dropout or config.attention_dropout) or attention_type != "self":
            raise ValueError("VarlenSdpa computes self-attention without dropout")
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attn_mask_type: AttnMaskType,
        packed_seq_params: ModalityPackedSeqParams,
    ) -> Tensor:
        """[S, N, D], [S, K, D], [S, K, D] -> [S, N * D], all in sequence order."""
        if attention_mask is not None or attn_mask_type != AttnMaskType.padding_causal:
            raise ValueError(
                "VarlenSdpa computes causal attention within each sample of a pack only"
            )
        lengths = packed_seq_params.sequence_lengths
        if self.cp_group is None:
            samples = zip(
                *(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True
            )
            out = [self._attend(q, k, v) for q, k, v in samples]
        else:
            out = self._attend_chunks(query, key, value, packed_seq_params)
        return torch.cat(out, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, q, D], [K, k, D], [K, k, D] -> [N, q, D]; the last query is at the last key's position."""
        queries, keys = query.shape[1], key.shape[1]
        mask = None
        if queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries)
        return F.scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=True,
        )[0]

    def _attend_chunks(
        self, query: Tensor, key: Tensor, value: Tensor, routing: ModalityPackedSeqParams
    ) -> list[Tensor]:
        """This rank's chunks, in its sequence order; see model/zigzag.py for which they are."""
        assert self.cp_group is not None and routing.from_gathered is not None
        both = gather_from_sequence_parallel_region(
            torch.stack([key, value], dim=1), tensor_parallel_output_grad=True, group=self.cp_group
        )
        both = select_rows(both, routing.from_gathered)  # [T, 2, K, D]
        chunks = zigzag_chunks(
            routing.sequence_lengths, cp_rank=self.cp_group.rank(), cp_size=self.cp_group.size()
        )
        queries = query.transpose(0, 1).split([chunk.size for chunk in chunks], dim=1)
        out = []
        for chunk, q in zip(chunks, queries, strict=True):
            seen = both[chunk.sample_start : chunk.start + chunk.size].permute(1, 2, 0, 3)
            out.append(self._attend(q, seen[0], seen[1]))
        return out
