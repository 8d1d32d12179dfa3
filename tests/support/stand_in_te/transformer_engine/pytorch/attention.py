# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class DotProductAttention(torch.nn.Module):
    """Packed causal attention; refuses everything that the product does not ask for."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and attention_type == "self" and cp_group is None
        self.heads = num_attention_heads // tp_size
        self.groups = (num_gqa_groups or num_attention_heads) // tp_size
        self.scale = softmax_scale or kv_channels**-0.5  # type: ignore[operator]

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None: ...

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        """[T, N, D], [T, K, D], [T, K, D] -> [T, N * D]."""
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert cu_seqlens_q is not None and cu_seqlens_q.dtype == torch.int32
        assert type(max_seqlen_q) is int and type(max_seqlen_kv) is int  # a tensor would be a sync
        assert query_layer.shape[1] == self.heads and key_layer.shape[1] == self.groups
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q and sum(lengths) == query_layer.shape[0]
        samples = zip(
            *(x.transpose(0, 1).split(lengths, 1) for x in (query_layer, key_layer, value_layer)),
            strict=True,
        )
        out = [
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=self.scale, enable_gqa=True
            )[0]
            for q, k, v in samples
        ]
        return torch.cat(out, dim=1).transpose(0, 1).flatten(1)
