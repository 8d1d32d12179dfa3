# SPDX-License-Identifier: Apache-2.0
"""The two values that travel through the data path: a `Sample` as a shard holds it, and the `Pack` that one
micro-batch is. Legend: T tokens of a pack, n_vision vision tokens among them (padding included), P patch tokens,
L labelled rows.

Two orders of the T tokens of a pack:
  sequence order   samples one after another, each in reading order; what attention sees;
  modality order   all vision tokens, then all text tokens, both in sequence order; what everything else sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # data_prep has samples, and needs no torch before its first one
    from torch import Tensor

VISION_PAD, VISION_PATCH, VISION_CLS, VISION_SPL = 0, 1, 2, 3
"""Kinds of vision tokens: padding (a zero row), a patch, the class token of an image, the end of a row of patches."""

IGNORE = -100
"""Label of a token that carries no loss."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; `text` may hold the mark `<image>` (constants in conversation.py)."""

    role: str  # "human" or "gpt"; "system" for a leading one
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of an MDS shard: encoded images and a conversation."""

    id: str
    images: tuple[bytes, ...]  # original encoded bytes
    image_sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels after EXIF rotation
    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch: T tokens of many samples, on the CPU. Padding tokens are samples of their own at the end.

    Every index tensor is computed here, on the host, so that the model never has to ask the device for a number."""

    num_vision: int  # vision tokens incl. padding; a multiple of `align`, at least one `align`, at most T - align
    cu_seqlens: Tensor  # [num_sequences + 1] int32, sequence order; padding is cut in sequences of at most `align`
    max_seqlen: int
    position_ids: Tensor
    """[T] int64, sequence order: 0..n-1 in each sequence, vision tokens count too."""
    modality_order: Tensor
    """[T] int64: modality_order[m] = sequence index of the m-th token in modality order."""
    text_ids: Tensor
    """[T - num_vision] int64: token ids of the text segment; padding holds the pad id."""
    vision_kind: Tensor  # [num_vision] uint8: VISION_PAD | VISION_PATCH | VISION_CLS | VISION_SPL
    patches: Tensor | None
    """[P, dense_stride**2, 3 * patch_stride**2] uint8 pixels; None where pixels are not needed."""
    label_rows: Tensor  # [L] int64: modality-order rows whose next token (in sequence order) is a target; ascending
    label_targets: Tensor  # [L] int64: that next token's id
    sample_ids: tuple[str, ...]  # real samples in the pack, in sequence order
    sample_places: tuple[int, ...]  # place of each sample among those of the step, in data order
    step_places: int  # above every place; the same for all packs of a run
    sample_padding: tuple[int, ...]  # padding tokens at the end of each sample (data.sample_align)
    num_real_vision: int  # without padding
    num_real_text: int  # without padding
    quarantined: tuple[tuple[str, str], ...]
    """(sample id, reason) of samples whose labels were masked while decoding."""

    @property
    def num_tokens(self) -> int:
        return int(self.modality_order.numel())


def image_token_count(height: int, width: int, *, pixels_per_token: int = 32) -> int:
    """Tokens of one resized image: patches, one SPL per row, one CLS. Height and width in pixels, both multiples."""
    rows, cols = height // pixels_per_token, width // pixels_per_token
    return rows * cols + rows + 1


__all__ = [
    "IGNORE",
    "VISION_CLS",
    "VISION_PAD",
    "VISION_PATCH",
    "VISION_SPL",
    "Pack",
    "Sample",
    "Turn",
]
