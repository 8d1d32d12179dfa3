# SPDX-License-Identifier: Apache-2.0
"""Configuration of EVEv2 for transformers: Qwen2's fields and the official EVE fields (baaivision/EVE, EVEv2).

`moe_part` is the official spelling of which components have separate weights for vision tokens: any of
`layernorm`, `self_attn` and `mlp`, joined by dashes. `mm_vision_tower` is kept as a label only: nothing is read
from that path, the geometry of the patch embedding is in `patch_stride`, `dense_stride` and `mm_hidden_size`.
"""

from typing import Any

from transformers import Qwen2Config


class EVEQwen2Config(Qwen2Config):
    """A Qwen2 decoder with EVEv2's patch embedding and modality-split weights."""

    model_type = "eve-qwen2"

    def __init__(
        self,
        *,
        head_dim: int | None = None,
        add_moe: bool = False,
        moe_part: str | None = None,
        mm_hidden_size: int = 1024,
        patch_stride: int = 16,
        dense_stride: int = 2,
        mm_vision_tower: str | None = None,
        tune_VE: bool = True,
        tune_LLM: bool = True,
        tune_MOE: bool = True,
        vision_tower_lr: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if head_dim is None:
            head_dim = self.hidden_size // self.num_attention_heads
        self.head_dim = head_dim
        # transformers 5 keeps it with what scales the rotary embedding.
        if not hasattr(self, "rope_theta"):
            self.rope_theta = self.rope_parameters["rope_theta"]
        self.add_moe = add_moe
        self.moe_part = moe_part
        self.mm_hidden_size = mm_hidden_size
        self.patch_stride = patch_stride
        self.dense_stride = dense_stride
        self.mm_vision_tower = mm_vision_tower
        self.tune_VE = tune_VE
        self.tune_LLM = tune_LLM
        self.tune_MOE = tune_MOE
        self.vision_tower_lr = vision_tower_lr

    def splits(self, part: str) -> bool:
        """Whether `part` (layernorm, self_attn or mlp) has separate weights for vision tokens."""
        return self.add_moe and part in (self.moe_part or "").split("-")


__all__ = ["EVEQwen2Config"]
