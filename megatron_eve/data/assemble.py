# SPDX-License-Identifier: Apache-2.0
"""From encoded samples and their pixels to the tensors of a `Pack` (sample.py has the legend and the two orders).

A sample's images are expanded where their placeholders stand: CLS, then each row of patches followed by SPL (official
vision_tokenizer.py:30-42). Behind the last sample come padding vision tokens, then padding text tokens, in sequences of
at most `align` tokens of their own. The vision segment is as short as alignment allows; what is left is text padding.
Token i predicts token i + 1 of its sample: the last token of an image, SPL, predicts the caption's first token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.read.quarantine import Reason
from megatron_eve.data.sample import (
    IGNORE,
    VISION_CLS,
    VISION_PAD,
    VISION_PATCH,
    VISION_SPL,
    Pack,
)
from megatron_eve.errors import DataError

_TEXT = 255
"""Marks a text token in arrays that hold vision kinds."""


@dataclass(frozen=True, slots=True)
class ExpandedSample:
    """A sample with every image token in its place. [n] arrays, in reading order."""

    kinds: NDArray[np.uint8]  # VISION_PATCH | VISION_CLS | VISION_SPL, or 255 for text
    ids: NDArray[np.int64]  # token id of text; IMAGE_PLACEHOLDER for vision
    labels: NDArray[np.int64]  # the token's own id where it is to be predicted, else IGNORE
    num_padding: int = 0  # of the last tokens

    @property
    def is_vision(self) -> NDArray[np.bool_]:
        return self.kinds != _TEXT


@dataclass(frozen=True, slots=True)
class PackMember:
    """One sample on its way into a pack."""

    id: str
    tokens: ExpandedSample
    quarantined: Reason | None  # set: the sample keeps its place but carries no label
    place: int  # among the samples of the step, in data order


def image_layout(*, rows: int, cols: int) -> NDArray[np.uint8]:
    """Vision kinds of one image: CLS, then `rows` times (`cols` patches, SPL)."""
    row = [VISION_PATCH] * cols + [VISION_SPL]
    return np.array([VISION_CLS] + row * rows, dtype=np.uint8)


def expand(encoded: EncodedSample, *, grids: Sequence[tuple[int, int]]) -> ExpandedSample:
    """Put the tokens of each image, `grids` of (rows, cols) patches, in the place of its placeholder.

    Raises DataError if there are not as many grids as placeholders."""
    places = np.flatnonzero(encoded.ids == IMAGE_PLACEHOLDER)
    if len(places) != len(grids):
        raise DataError(
            f"sample has {len(places)} image placeholders but {len(grids)} images; "
            "encode it with the number of images that it has."
        )
    layouts = [image_layout(rows=rows, cols=cols) for rows, cols in grids]
    repeats = np.ones(encoded.ids.size, dtype=np.int64)
    repeats[places] = [layout.size for layout in layouts]
    ids = np.repeat(encoded.ids, repeats)
    kinds = np.full(ids.size, _TEXT, dtype=np.uint8)
    kinds[ids == IMAGE_PLACEHOLDER] = np.concatenate([np.empty(0, np.uint8), *layouts])
    return ExpandedSample(kinds=kinds, ids=ids, labels=np.repeat(encoded.labels, repeats))


def pad_sample(sample: ExpandedSample, count: int, *, pad_id: int) -> ExpandedSample:
    """The sample followed by `count` text tokens that nothing predicts and that predict nothing."""
    if not count:
        return sample
    return ExpandedSample(
        kinds=np.pad(sample.kinds, (0, count), constant_values=_TEXT),
        ids=np.pad(sample.ids, (0, count), constant_values=pad_id),
        labels=np.pad(sample.labels, (0, count), constant_values=IGNORE),
        num_padding=sample.num_padding + count,
    )


def blank_sample(num_vision: int, num_text: int, *, pad_id: int) -> ExpandedSample:
    """So many empty tokens, in the place of a sample that cannot be read."""
    kinds = np.repeat(np.array([VISION_PAD, _TEXT], np.uint8), [num_vision, num_text])
    return ExpandedSample(
        kinds=kinds,
        ids=np.where(kinds == _TEXT, pad_id, IMAGE_PLACEHOLDER),
        labels=np.full(kinds.size, IGNORE, dtype=np.int64),
    )


def assemble_pack(
    members: Sequence[PackMember],
    *,
    patches: NDArray[np.uint8],
    shape: PackShape,
    pad_id: int,
    step_places: int,
) -> Pack:
    """The pack of these samples, in this order; without samples a pack of padding, which has no label.

    `patches` [P, dense_stride**2, 3 * patch_stride**2]: of all images of all samples, in order. `step_places`: more
    than the place of any sample. Raises DataError if the samples do not fit or the patches are not as many as the
    samples' tokens say."""
    tokens = [member.tokens for member in members]
    padding, num_vision, num_real = _padding_after(tokens, shape=shape, pad_id=pad_id)
    every = [*tokens, padding]
    kinds = np.concatenate([one.kinds for one in every])
    ids = np.concatenate([one.ids for one in every])
    targets = np.concatenate([_next_targets(member) for member in members] + [padding.labels])

    is_vision = kinds != _TEXT
    order = np.concatenate([np.flatnonzero(is_vision), np.flatnonzero(~is_vision)])
    assert order.size == shape.pack_tokens
    targets_in_order = targets[order]
    label_rows = np.flatnonzero(targets_in_order != IGNORE)
    lengths = [one.ids.size for one in tokens] + _padding_lengths(padding.ids.size, shape=shape)
    num_patches = int(np.count_nonzero(kinds == VISION_PATCH))
    if len(patches) != num_patches:
        raise DataError(f"{len(patches)} patches given, the samples' images have {num_patches}")
    return Pack(
        num_vision=num_vision,
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_seqlen=max(lengths),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        modality_order=torch.from_numpy(order),
        text_ids=torch.from_numpy(ids[order[num_vision:]]),
        vision_kind=torch.from_numpy(kinds[order[:num_vision]]),
        patches=torch.from_numpy(patches),
        label_rows=torch.from_numpy(label_rows),
        label_targets=torch.from_numpy(targets_in_order[label_rows]),
        sample_ids=tuple(member.id for member in members),
        sample_places=tuple(member.place for member in members),
        step_places=step_places,
        sample_padding=tuple(one.num_padding for one in tokens),
        num_real_vision=num_real[0],
        num_real_text=num_real[1] - sum(one.num_padding for one in tokens),
        quarantined=tuple((m.id, m.quarantined) for m in members if m.quarantined is not None),
    )


def _padding_after(
    tokens: Sequence[ExpandedSample], *, shape: PackShape, pad_id: int
) -> tuple[ExpandedSample, int, tuple[int, int]]:
    """(padding tokens, length of the vision segment, (vision, text) tokens of the samples)."""
    real_vision = sum(int(np.count_nonzero(one.is_vision)) for one in tokens)
    real_text = sum(one.ids.size for one in tokens) - real_vision
    if not shape.fits(real_vision, real_text):
        raise DataError(
            f"{len(tokens)} samples with {real_vision} vision and {real_text} text tokens do not fit "
            f"into a pack of {shape.pack_tokens} tokens aligned to {shape.align}; plan packs with PackShape.fits."
        )
    num_vision = shape.segment(real_vision)
    pad_vision = num_vision - real_vision
    pad_text = shape.pack_tokens - num_vision - real_text
    padding = blank_sample(pad_vision, pad_text, pad_id=pad_id)
    return padding, num_vision, (real_vision, real_text)


def _next_targets(member: PackMember) -> NDArray[np.int64]:
    """[n] the token that each token of a sample is to predict, or IGNORE; all IGNORE in a quarantined sample."""
    targets = np.full(member.tokens.labels.size, IGNORE, dtype=np.int64)
    if member.quarantined is None:
        targets[:-1] = member.tokens.labels[1:]
    return targets


def _padding_lengths(num_tokens: int, *, shape: PackShape) -> list[int]:
    full, rest = divmod(num_tokens, shape.align)
    return [shape.align] * full + ([rest] if rest else [])
