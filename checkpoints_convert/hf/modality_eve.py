# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a padded batch are vision, text or padding, and how they are sorted, masked and numbered.

Legend: B batch, L padded length, T real tokens, P patch tokens of a sample, X any width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TEXT, PATCH, CLS, SPL = 0, 1, 2, 3
"""What a token is: text, a patch of an image, the class token in front of it, the end of a row of patches."""
IGNORED = -100
"""A label that is no target."""


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
    def all_text(cls, shape: torch.Size) -> "TokenOrder":
        """Every token of [B, L] is text, and none is left out."""
        return cls(None, 0, *shape)

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
        return x_TX.reshape(self.batch, self.length, x_TX.shape[1])


def by_modality(text: nn.Module, vision: nn.Module | None, x_TX: Tensor, num_vision: int) -> Tensor:
    """The first `num_vision` rows through `vision`, the others through `text`; all through `text` if not split."""
    if vision is None or num_vision == 0:
        return text(x_TX)
    if num_vision == len(x_TX):
        return vision(x_TX)
    return torch.cat((vision(x_TX[:num_vision]), text(x_TX[num_vision:])))


def select_patches(kinds: Tensor, pixels: Tensor | None, *, shape: tuple[int, int]) -> Tensor:
    """The patches of all samples one after another, without the padding of `pixels`. `shape`: of a patch's values."""
    counts = (kinds == PATCH).sum(1)
    available = 0 if pixels is None else pixels.shape[1]
    if pixels is None or int(counts.max()) > available or len(pixels) != len(kinds):
        found = "no pixel_values" if pixels is None else f"pixel_values {list(pixels.shape)}"
        raise ValueError(
            f"token_kinds asks for {counts.tolist()} patches in {len(kinds)} samples, found {found}; pass both as "
            "EVEProcessor returned them."
        )
    if tuple(pixels.shape[2:]) != shape:
        raise ValueError(
            f"pixel_values has patches of {list(pixels.shape[2:])} values, this model reads {list(shape)} "
            "(dense_stride ** 2, 3 * patch_stride ** 2 of config.json); use the processor of the model's own folder."
        )
    is_asked = torch.arange(available, device=counts.device) < counts[:, None]
    if bool((pixels.flatten(2).any(-1) & ~is_asked).any()):
        raise ValueError(
            f"pixel_values holds more than the {counts.tolist()} patches that token_kinds asks for; pass both as "
            "EVEProcessor returned them."
        )
    return pixels[is_asked]


def check_inputs(input_ids: Tensor, kinds: Tensor | None, pixels: Tensor | None) -> None:
    """Refuse pixels that no token stands for, and kinds of another shape or of no meaning."""
    if kinds is None:
        if pixels is not None:
            raise ValueError(
                "pixel_values without token_kinds: which tokens are patches is not known; pass both as EVEProcessor "
                "returned them."
            )
        return
    if kinds.shape != input_ids.shape:
        raise ValueError(
            f"token_kinds has shape {list(kinds.shape)}, input_ids {list(input_ids.shape)}; they must agree."
        )
    if bool(((kinds < TEXT) | (kinds > SPL)).any()):
        raise ValueError(
            f"token_kinds holds {sorted(set(kinds.flatten().tolist()) - {TEXT, PATCH, CLS, SPL})}; expected 0 (text), "
            "1 (patch), 2 (image's class token) and 3 (end of a row of patches)."
        )


def check_mask(attention_mask: Tensor, *, expected: tuple[int, int], past: int) -> None:
    """Refuse a mask of another shape than [B, past + L], and other values than 0 and 1."""
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected {list(expected)}: a row for each "
            f"sample, and the {past} tokens in the cache before the new ones."
        )
    if bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise ValueError(
            "attention_mask holds other values than 0 (padding) and 1; pass the one that EVEProcessor returned."
        )


def check_hidden_images(kinds: Tensor, is_real: Tensor) -> None:
    """Refuse a mask that hides an image."""
    if bool(((kinds != TEXT) & ~is_real).any()):
        raise ValueError(
            "attention_mask is 0 at an image token; pass the attention_mask that EVEProcessor returned (without "
            "it, generate() takes every pad token for padding)."
        )


def real_targets(
    labels: Tensor, input_ids: Tensor, kinds: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """The labels with none at padding, nor at a token that padding stands before: nothing predicts it.

    Refuses targets at images, and labels that hold no target at all."""
    if labels.shape != input_ids.shape:
        raise ValueError(
            f"labels has shape {list(labels.shape)}, input_ids {list(input_ids.shape)}; they must agree (the shift by "
            "a token is done here)."
        )
    if kinds is not None and bool(((labels != IGNORED) & (kinds != TEXT)).any()):
        raise ValueError(
            f"labels has a target at an image token, where input_ids holds a filler; set it to {IGNORED} there."
        )
    if attention_mask is not None:
        is_padding = attention_mask[:, -labels.shape[1] :] == 0
        is_first = torch.cat((torch.zeros_like(is_padding[:, :1]), is_padding[:, :-1]), dim=1)
        labels = labels.masked_fill(is_padding | is_first, IGNORED)
    if not bool((labels[:, 1:] != IGNORED).any()):
        raise ValueError(
            f"labels holds no target: each is {IGNORED}, at padding, or the first of its sample, which nothing "
            "predicts. The loss would be NaN."
        )
    return labels


def position_ids(input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """[B or 1, L]: positions count real tokens, vision tokens included."""
    length = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(past, past + length, device=input_ids.device)[None]
    counted = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    return counted[:, past : past + length]


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


def static_bias(attention_mask: Tensor | None, slots: Tensor, num_slots: int) -> Tensor:
    """As `attention_bias` for a cache of `num_slots` places, the new tokens at `slots` [L]: [B or 1, 1, L, num_slots].

    `attention_mask` [B, num_slots]; empty places are behind every query."""
    queries, keys = slots[:, None], torch.arange(num_slots, device=slots.device)[None]
    if attention_mask is None:
        return (keys <= queries)[None, None]
    allowed = (keys <= queries) & attention_mask.bool()[:, None, :]
    return (allowed | (keys == queries))[:, None]


__all__ = [
    "CLS",
    "IGNORED",
    "PATCH",
    "SPL",
    "TEXT",
    "TokenOrder",
    "attention_bias",
    "by_modality",
    "check_hidden_images",
    "check_inputs",
    "check_mask",
    "position_ids",
    "real_targets",
    "select_patches",
    "static_bias",
]
