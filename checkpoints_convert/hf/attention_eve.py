# SPDX-License-Identifier: Apache-2.0
"""Joint causal attention over vision and text tokens, its rotary embedding, and what a key-value cache asks of it.

A cache either grows (DynamicCache: keys of the tokens so far) or has its full length from the start (StaticCache: the
rest is empty and masked). The weights are computed explicitly where they are asked for or `attn_implementation="eager"`
was chosen, else by PyTorch's scaled_dot_product_attention; both are the same up to rounding.

Legend: B batch, L padded length, T real tokens, N query heads, G key/value heads, D head dim, K keys, X any width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import StaticCache

from .configuration_eve import EVEQwen2Config
from .modality_eve import TokenOrder, by_modality


def slots_of(cache: Any) -> int | None:
    """Number of tokens that a static cache has room for; None for a cache that grows."""
    if not isinstance(cache, StaticCache):
        return None
    found = getattr(cache, "max_cache_len", None)
    if found is None:  # later versions of 5 have the method alone
        found = cache.get_max_length()  # type: ignore[attr-defined]
    return int(found)


def rotary_table(
    positions_BL: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, D], computed in float32, then cast."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_BL.device).float()
    angles = positions_BL[..., None].float() * (1.0 / theta ** (exponent / head_dim))
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BNLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation layout."""
    first, second = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * cos + torch.cat((-second, first), dim=-1) * sin


def attend(
    q_BNLD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, mask: Tensor | None, *, with_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """[B, N, L, D], and the weights [B, N, L, K] if they are asked for."""
    is_causal = mask is None and q_BNLD.shape[2] > 1
    if not with_weights:
        out = F.scaled_dot_product_attention(
            q_BNLD, k_BNKD, v_BNKD, attn_mask=mask, is_causal=is_causal
        )
        return out, None
    scores = q_BNLD @ k_BNKD.transpose(-1, -2) * q_BNLD.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q_BNLD.dtype)
    return weights @ v_BNKD, weights


class EVEAttention(nn.Module):
    """Joint causal attention over vision and text tokens; the projections may be split."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    moe_q_proj: nn.Linear | None
    moe_k_proj: nn.Linear | None
    moe_v_proj: nn.Linear | None
    moe_o_proj: nn.Linear | None

    def __init__(self, config: EVEQwen2Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.head_dim
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        query, key = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        for prefix in ("", "moe_"):
            exists = prefix == "" or config.splits("self_attn")
            shapes = {"q": (query, True), "k": (key, True), "v": (key, True)}
            for name, (width, bias) in shapes.items():
                linear = nn.Linear(config.hidden_size, width, bias=bias) if exists else None
                self.register_module(f"{prefix}{name}_proj", linear)
            output = nn.Linear(query, config.hidden_size, bias=False) if exists else None
            self.register_module(f"{prefix}o_proj", output)

    def heads(self, x_TX: Tensor, order: TokenOrder) -> Tensor:
        """[T, N * D] -> [B, N, L, D]."""
        heads = x_TX.shape[1] // self.head_dim
        shape = (order.batch, order.length, heads, self.head_dim)
        return order.scatter(x_TX).reshape(shape).transpose(1, 2)

    def forward(
        self,
        x_TH: Tensor,
        order: TokenOrder,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        slots: Tensor | None,
        with_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`slots` [L]: where a static cache keeps the tokens; None: behind the others. The rest as of a layer."""
        num_vision = order.num_vision
        q = self.heads(by_modality(self.q_proj, self.moe_q_proj, x_TH, num_vision), order)
        k = self.heads(by_modality(self.k_proj, self.moe_k_proj, x_TH, num_vision), order)
        v = self.heads(by_modality(self.v_proj, self.moe_v_proj, x_TH, num_vision), order)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if slots is not None:
            k, v = cache.update(k, v, self.layer_index, {"cache_position": slots})
        elif cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        out, weights = attend(q, k, v, mask, with_weights=with_weights)
        out_TX = order.gather(out.transpose(1, 2).flatten(2))
        return by_modality(self.o_proj, self.moe_o_proj, out_TX, num_vision), weights


__all__ = ["EVEAttention", "attend", "rotary_table", "rotate", "slots_of"]
