# SPDX-License-Identifier: Apache-2.0
"""Self-attention with modality-partitioned projections around one joint causal attention.

Legend: T tokens of the pack, N query heads and K key/value heads of this tensor-parallel rank, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_eve.model.modality import ModalityPackedSeqParams, permute_rows
from megatron_eve.model.partitioned import apply_partitioned


def rotate_half(x: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-rotation layout of HF Qwen2; x [T, heads, D], cos and sin [T, 1, D] in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class EveSelfAttention(SelfAttention):
    """megatron-core's SelfAttention with the rows permuted to sequence order for the core attention, and back."""

    def forward(
        self, hidden_states: Tensor, *, packed_seq_params: ModalityPackedSeqParams
    ) -> Tensor:
        """[rows, 1, h] -> [rows, 1, h], rows of this rank's residual stream and in its order."""
        routing = packed_seq_params
        mixed, _ = apply_partitioned(self.linear_qkv, hidden_states, routing.num_local_vision)
        assert routing.to_sequence is not None and routing.to_rows is not None
        mixed = permute_rows(mixed[:, 0], index=routing.to_sequence, inverse=routing.to_rows)
        query, key, value = self._split_heads(mixed)
        assert routing.rope_cos is not None and routing.rope_sin is not None
        query = rotate_half(query, cos=routing.rope_cos, sin=routing.rope_sin)
        key = rotate_half(key, cos=routing.rope_cos, sin=routing.rope_sin)
        context = self._core(query, key, value, routing).flatten(1)
        context = permute_rows(context, index=routing.to_rows, inverse=routing.to_sequence)
        out, _ = apply_partitioned(self.linear_proj, context.unsqueeze(1), routing.num_vision)
        return out

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

    Memory is linear in the pack: no mask over the pack, and torch's kernels tile each sample. Takes the arguments of
    megatron-core's core attentions; refuses what it does not compute (dropout, a bias, another mask)."""

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
        """[T, N, D], [T, K, D], [T, K, D] -> [T, N * D], all in sequence order."""
        if attention_mask is not None or attn_mask_type != AttnMaskType.padding_causal:
            raise ValueError(
                "VarlenSdpa computes causal attention within each sample of a pack only"
            )
        lengths = packed_seq_params.sequence_lengths
        samples = zip(
            *(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True
        )
        out = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=self.scale, enable_gqa=True
            )[0]
            for q, k, v in samples
        ]
        return torch.cat(out, dim=1).transpose(0, 1).flatten(1)
