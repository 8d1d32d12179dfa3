# SPDX-License-Identifier: Apache-2.0
"""Configuration of EVEv2 for transformers: Qwen2's fields and the official EVE fields (baaivision/EVE, EVEv2).

`moe_part` is the official spelling of which components have separate weights for vision tokens: any of
`layernorm`, `self_attn` and `mlp`, joined by dashes. `mm_vision_tower` is kept as a label only: nothing is read
from that path, the geometry of the patch embedding is in `patch_stride`, `dense_stride` and `mm_hidden_size`.
"""

from typing import Any

from transformers import Qwen2Config

COMPUTED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
}
"""Fields of Qwen2 and Llama configurations, and the only value of each that this decoder computes. (Biases of q, k and
v are always there; `attention_bias` would ask for the output's, too.)"""
PARTS = ("layernorm", "self_attn", "mlp")


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
        for name in ("rope_scaling", "rope_parameters"):
            refuse_scaling(name, kwargs.get(name))  # before versions of 5 make something else of it
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

    def check_computed(self) -> None:
        """Raises: ValueError for a field with a value that the model would not follow, by its name."""
        for name, value in COMPUTED.items():
            if (found := getattr(self, name, None)) not in (None, value):
                raise ValueError(
                    f"{name}={found!r} is not computed by this model; leave it at {value!r}."
                )
        for name in ("rope_scaling", "rope_parameters"):
            found = getattr(self, name, None)
            refuse_scaling(name, found)
            if (found or {}).get("rope_theta", self.rope_theta) != self.rope_theta:
                raise ValueError(
                    f"{name}={found!r} is not computed by this model: rope_theta is {self.rope_theta!r}."
                )
        if sliding := set(getattr(self, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(
                f"layer_types has {sorted(sliding)}; every layer attends to all tokens."
            )
        parts = [part for part in (self.moe_part or "").split("-") if part]
        unknown = sorted(set(parts) - set(PARTS))
        if unknown or (self.add_moe and not parts):
            raise ValueError(
                f"moe_part={self.moe_part!r} with add_moe={self.add_moe!r}; expected some of {', '.join(PARTS)}, "
                "joined by dashes."
            )

    def splits(self, part: str) -> bool:
        """Whether `part` (layernorm, self_attn or mlp) has separate weights for vision tokens."""
        return self.add_moe and part in (self.moe_part or "").split("-")


def refuse_scaling(name: str, found: Any) -> None:
    """Raises: ValueError for anything that scales rotary positions, or does something that is not known to be none."""
    rest = dict(found or {})
    kind = rest.pop("rope_type", rest.pop("type", None))
    rest.pop("rope_theta", None)
    if kind not in (None, "default") or any(value not in (None, 1.0) for value in rest.values()):
        raise ValueError(
            f"{name}={found!r} is not computed by this model: rotary positions are not scaled. Take it out."
        )


__all__ = ["EVEQwen2Config"]
