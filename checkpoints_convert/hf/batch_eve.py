# SPDX-License-Identifier: Apache-2.0
"""Prompts of different lengths as one batch: padding, truncation, and which image belongs to which prompt.

In: token ids, kinds and patches of each prompt, and a processor's keywords in transformers' words. Out: padded tensors.
Refused by name: keywords that would do nothing together, a cut through an image, prompts of several lengths without
padding, images that are no pictures, and other numbers of images than of marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from .modality_eve import TEXT

IMAGE_MARK = "<image>"
PaddingSide = Literal["left", "right"]
_UNLIMITED = 10**9
"""transformers' model_max_length of a tokenizer that names none is larger."""


@dataclass(frozen=True)
class PromptTokens:
    """One prompt as the model reads it, not padded."""

    ids: np.ndarray  # [L] int64
    kinds: np.ndarray  # [L] int64
    patches: np.ndarray  # of all its images


@dataclass(frozen=True)
class Lengths:
    """How long the rows of a batch become."""

    side: PaddingSide = "left"
    cut_to: int | None = None  # longer prompts are cut; None: none is
    cut_side: PaddingSide = "right"
    pad_to: int | None = None  # None: to the longest
    multiple_of: int | None = None
    may_pad: bool = True

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        padding: bool | str | None,
        padding_side: str | None,
        truncation: bool | str | None,
        max_length: int | None,
        pad_to_multiple_of: int | None,
    ) -> "Lengths":
        """From a processor's keywords; None of a side is the tokenizer's. Raises: ValueError."""
        may_pad, to_limit = _padding(padding)
        is_cut = _truncation(truncation)
        if max_length is not None and not (to_limit or is_cut):
            raise ValueError(
                f"max_length={max_length} does nothing by itself; add truncation=True or padding='max_length'."
            )
        if pad_to_multiple_of is not None and (not may_pad or pad_to_multiple_of < 1):
            raise ValueError(
                f"pad_to_multiple_of={pad_to_multiple_of} with padding={padding!r}; expected at least 1, and padding."
            )
        limit = _limit(tokenizer, max_length) if to_limit or is_cut else None
        return cls(
            side=_side("padding_side", padding_side or getattr(tokenizer, "padding_side", "left")),
            cut_to=limit if is_cut else None,
            cut_side=_side("truncation_side", getattr(tokenizer, "truncation_side", "right")),
            pad_to=limit if to_limit else None,
            multiple_of=pad_to_multiple_of,
            may_pad=may_pad,
        )

    def cut(self, prompt: PromptTokens, row: int) -> PromptTokens:
        """At most `cut_to` tokens. Raises: ValueError if the cut would take something of an image."""
        excess = 0 if self.cut_to is None else len(prompt.ids) - self.cut_to
        if excess <= 0:
            return prompt
        at_end = self.cut_side == "right"
        kept = slice(0, self.cut_to) if at_end else slice(excess, None)
        lost = prompt.kinds[self.cut_to :] if at_end else prompt.kinds[:excess]
        if (lost != TEXT).any():
            raise ValueError(
                f"Prompt {row} has {len(prompt.ids)} tokens; cutting it to {self.cut_to} would cut an image. Allow "
                "more (max_length), give a smaller image, or shorten the text."
            )
        return PromptTokens(prompt.ids[kept], prompt.kinds[kept], prompt.patches)

    def length(self, lengths: Sequence[int]) -> int:
        """Of every row of a batch whose prompts have these. Raises: ValueError."""
        longest = max(lengths)
        if not self.may_pad and len(set(lengths)) > 1:
            raise ValueError(
                f"The prompts have {list(lengths)} tokens, and a batch is one tensor; use padding=True, or one prompt "
                "at a time."
            )
        if self.pad_to is not None and longest > self.pad_to:
            raise ValueError(
                f"A prompt has {longest} tokens, more than max_length={self.pad_to}; add truncation=True or allow more."
            )
        found = longest if self.pad_to is None else self.pad_to
        step = self.multiple_of or 1
        return -(-found // step) * step


def collated(
    prompts: Sequence[PromptTokens], lengths: Lengths, *, pad_id: int
) -> dict[str, torch.Tensor]:
    """Padded tensors; patches are padded at their end. No image at all: neither kinds nor pixels."""
    if empty := [row for row, prompt in enumerate(prompts) if len(prompt.ids) == 0]:
        raise ValueError(f"Prompt {empty[0]} is empty; give a text, an image, or both.")
    prompts = [lengths.cut(prompt, row) for row, prompt in enumerate(prompts)]
    length = lengths.length([len(prompt.ids) for prompt in prompts])
    most = max(len(prompt.patches) for prompt in prompts)
    shape = (len(prompts), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask, token_kinds = torch.zeros(shape, dtype=torch.int64), torch.full(shape, TEXT)
    pixels = torch.zeros(len(prompts), most, *prompts[0].patches.shape[1:])
    for row, prompt in enumerate(prompts):
        start = length - len(prompt.ids) if lengths.side == "left" else 0
        end = start + len(prompt.ids)
        input_ids[row, start:end] = torch.from_numpy(prompt.ids)
        mask[row, start:end] = 1
        token_kinds[row, start:end] = torch.from_numpy(prompt.kinds)
        pixels[row, : len(prompt.patches)] = torch.from_numpy(prompt.patches)
    batch = {"input_ids": input_ids, "attention_mask": mask}
    if most:
        batch |= {"token_kinds": token_kinds, "pixel_values": pixels}
    return batch


def texts_of(text: Any) -> list[str]:
    """The prompts. Raises: TypeError for anything but texts."""
    texts = [text] if isinstance(text, str) else text
    if isinstance(texts, list | tuple) and texts and all(isinstance(t, str) for t in texts):
        return list(texts)
    raise TypeError(
        f"text is {_kind(text)}, expected a text or a list of texts with a {IMAGE_MARK} mark for each image; call "
        "processor(text=..., images=...)."
    )


def assign_images(texts: Sequence[str], images: Any) -> list[list[Image.Image]]:
    """The images of each text, checked against its marks."""
    counts = [text.count(IMAGE_MARK) for text in texts]
    if images is None:
        given: list[Any] = []
    elif getattr(images, "ndim", 0) == 4:  # an array of images
        given = list(images)
    else:
        given = list(images) if isinstance(images, list | tuple) else [images]
    if any(isinstance(entry, list | tuple) for entry in given):
        groups = [list(group) if isinstance(group, list | tuple) else [group] for group in given]
    elif len(given) == sum(counts):
        queue = iter(given)
        groups = [[next(queue) for _ in range(count)] for count in counts]
    else:
        groups = [given]
    pictures = [[as_picture(image) for image in group] for group in groups]
    if [len(group) for group in groups] != counts:
        raise ValueError(
            f"The prompts have {counts} {IMAGE_MARK} marks, but {[len(group) for group in groups]} images were "
            "given; pass one image for each mark, in order."
        )
    return pictures


def as_picture(image: Any) -> Image.Image:
    """A PIL image, or an array of 0 to 255 (uint8): [H, W], or with 1, 3 or 4 colours first or last."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"Images must be PIL images, found {type(image).__name__}: open them first."
        )
    if image.dtype != np.uint8:
        raise TypeError(
            f"An image is an array of {image.dtype}; give a PIL image, or uint8 from 0 to 255."
        )
    if image.ndim == 3:
        first, last = (image.shape[axis] in (1, 3, 4) for axis in (0, 2))
        if first == last:
            raise ValueError(
                f"An image is an array of shape {list(image.shape)}, of which neither or both of the first and last "
                "axis can be its colours; give a PIL image."
            )
        image = image.transpose(1, 2, 0) if first else image
        image = image[..., 0] if image.shape[2] == 1 else image
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"An image is an array of shape {list(image.shape)}; give a PIL image.")
    return Image.fromarray(np.ascontiguousarray(image))


def _padding(padding: bool | str | None) -> tuple[bool, bool]:
    """Whether rows may be padded, and whether to a given length."""
    if padding is True or padding == "longest":
        return True, False
    if padding == "max_length":
        return True, True
    if padding is False or padding is None or padding == "do_not_pad":
        return False, False
    raise ValueError(
        f"padding={padding!r} is unknown; use True ('longest'), 'max_length' or False ('do_not_pad')."
    )


def _truncation(truncation: bool | str | None) -> bool:
    if truncation in (None, False, "do_not_truncate"):
        return False
    if truncation in (True, "longest_first", "only_first"):
        return True
    raise ValueError(f"truncation={truncation!r} is unknown; use True or False.")


def _limit(tokenizer: Any, max_length: int | None) -> int:
    found = tokenizer.model_max_length if max_length is None else max_length
    if not 1 <= found < _UNLIMITED:
        raise ValueError(f"max_length is {found}; name the number of tokens (max_length=...).")
    return int(found)


def _side(name: str, side: Any) -> PaddingSide:
    if side not in ("left", "right"):
        raise ValueError(f"{name}={side!r} is unknown; use 'left' or 'right'.")
    found: PaddingSide = side
    return found


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return (
            f"a list of {', '.join(sorted({type(entry).__name__ for entry in value})) or 'nothing'}"
        )
    return type(value).__name__


__all__ = ["IMAGE_MARK", "Lengths", "PromptTokens", "assign_images", "collated", "texts_of"]
