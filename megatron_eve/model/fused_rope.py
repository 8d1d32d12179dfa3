# SPDX-License-Identifier: Apache-2.0
"""Self-attention with the fused permutation and rotary positions of rope_permute.py (gpu.fused_rope)."""

from torch import Tensor

from megatron_eve.kernels.rope_permute import permute_rope
from megatron_eve.model.attention import EveSelfAttention
from megatron_eve.model.modality import ModalityPackedSeqParams


class FusedRopeSelfAttention(EveSelfAttention):
    """EveSelfAttention but for one step: see _to_heads there."""

    def _to_heads(
        self, mixed: Tensor, routing: ModalityPackedSeqParams
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert routing.rope_cos is not None and routing.rope_sin is not None
        groups = self.num_query_groups_per_partition
        return permute_rope(
            mixed,
            to_sequence=routing.to_sequence,
            to_rows=routing.to_rows,
            cos=routing.rope_cos,
            sin=routing.rope_sin,
            groups=groups,
            per_group=self.num_attention_heads_per_partition // groups,
        )
