# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a padded batch are vision, text or padding, and how they are sorted, masked and numbered.

Legend: B batch, L padded length, T real tokens, P patch tokens of a sample, X any width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TEXT, PATCH, CLS, SPL = 0, 1, 2, 3
"""What a token is: text, a patch of an image, the class token in front of it, the end of a row of patches."""


@dataclass(frozen=True)
class TokenOrder:
    """The real tokens of a padded batch in modality order: all vision tokens, then all text tokens.

    Its rows stay on the input's device, wherever a layer lies (`device_map`)."""

    rows: (
        Tensor | None
    )  # [T] positions in the flattened [B * L]; None: no vision token and no padding
    num_vision: int
    batch: int
    length: int

    @classmethod
    def of(cls, kinds: Tensor, is_real: Tensor | None) -> "TokenOrder":
        """`kinds` [B, L], `is_real` [B, L] bool or None when nothing is padding."""
        is_vision = kinds.flatten() != TEXT
        is_text = ~is_vision if is_real is None else is_real.flatten() & ~is_vision
        vision, text = is_vision.nonzero()[:, 0], is_text.nonzero()[:, 0]
        identity = len(vision) == 0 and is_real is None
        rows = None if identity else torch.cat((vision, text))
        return cls(rows, len(vision), *kinds.shape)

    def gather(self, x_BLX: Tensor) -> Tensor:
        """[B, L, X] -> [T, X]."""
        flat = x_BLX.flatten(0, 1)
        return flat if self.rows is None else flat[self.rows.to(flat.device)]

    def scatter(self, x_TX: Tensor) -> Tensor:
        """[T, X] -> [B, L, X], zeros at padding."""
        if self.rows is not None:
            flat = x_TX.new_zeros(self.batch * self.length, x_TX.shape[1])
            x_TX = flat.index_copy(0, self.rows.to(flat.device), x_TX)
        return x_TX.unflatten(0, (self.batch, self.length))


def by_modality(text: nn.Module, vision: nn.Module | None, x_TX: Tensor, num_vision: int) -> Tensor:
    """The first `num_vision` rows through `vision`, the others through `text`; all through `text` if not split."""
    if vision is None or num_vision == 0:
        return text(x_TX)
    if num_vision == len(x_TX):
        return vision(x_TX)
    return torch.cat((vision(x_TX[:num_vision]), text(x_TX[num_vision:])))


def select_patches(kinds: Tensor, pixels: Tensor | None) -> Tensor:
    """The patches of all samples one after another, without the padding of `pixels`."""
    counts = (kinds == PATCH).sum(1)
    available = 0 if pixels is None else pixels.shape[1]
    if pixels is None or int(counts.max()) > available or len(pixels) != len(kinds):
        found = "no pixel_values" if pixels is None else f"pixel_values {list(pixels.shape)}"
        raise ValueError(
            f"token_kinds asks for {counts.tolist()} patches in {len(kinds)} samples, found {found}; pass both as "
            "EVEProcessor returned them."
        )
    return pixels[torch.arange(available, device=counts.device) < counts[:, None]]


def check_inputs(input_ids: Tensor, kinds: Tensor, is_real: Tensor | None) -> None:
    """Refuse kinds of another shape, and a mask that hides an image."""
    if kinds.shape != input_ids.shape:
        raise ValueError(
            f"token_kinds has shape {list(kinds.shape)}, input_ids {list(input_ids.shape)}; they must agree."
        )
    if is_real is not None and bool(((kinds != TEXT) & ~is_real).any()):
        raise ValueError(
            "attention_mask is 0 at an image token; pass the attention_mask that EVEProcessor returned (without "
            "it, generate() takes every pad token for padding)."
        )


def position_ids(input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """[B or 1, L]: positions count real tokens, vision tokens included."""
    if attention_mask is None:
        return torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]


def attention_bias(
    attention_mask: Tensor | None, past: int, length: int, *, device: torch.device
) -> Tensor | None:
    """Bool mask [B, 1, L, past + L], true where attention is allowed; None where causality needs no mask.

    A padding query may look at itself, so that no row is empty; nothing reads its result."""
    if attention_mask is None and (past == 0 or length == 1):
        return None
    queries = torch.arange(past, past + length, device=device)[:, None]
    keys = torch.arange(past + length, device=device)[None]
    if attention_mask is None:
        return (keys <= queries)[None, None]
    allowed = (keys <= queries) & attention_mask.bool()[:, None, :]
    return (allowed | (keys == queries))[:, None]


__all__ = [
    "CLS",
    "PATCH",
    "SPL",
    "TEXT",
    "TokenOrder",
    "attention_bias",
    "by_modality",
    "check_inputs",
    "position_ids",
    "select_patches",
]
