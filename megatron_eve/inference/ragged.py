# SPDX-License-Identifier: Apache-2.0
"""Prompts of different lengths as one batch without padding, sorted by modality: what the prefill runs on.

The residual stream holds the rows of all prompts, all vision rows first, then all text rows: each branch runs on one
contiguous slice; attention alone sees prompt after prompt. Every index is computed here on the host.

Legend: T rows of all prompts, V vision rows among them, R prompts, P patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TEXT = 255
"""Marks a text token among the vision kinds (megatron_eve.data.sample.VISION_*)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model reads it, images expanded in their places."""

    ids: NDArray[np.int64]  # [n] token ids; anything at vision tokens
    kinds: NDArray[np.uint8]  # [n] VISION_PATCH | VISION_CLS | VISION_SPL, or TEXT
    patches: NDArray[np.uint8]  # [P, d*d, 3*p*p] pixels of all its images, reading order

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text_ids(self) -> NDArray[np.int64]:
        """[n - vision tokens]: what a repetition penalty looks at."""
        return self.ids[self.kinds == TEXT]


@dataclass(frozen=True, slots=True)
class RaggedPrompts:
    """Several prompts in modality order. Tensors are on the device."""

    num_vision: int  # V
    lengths: tuple[int, ...]  # of each prompt
    text_ids: Tensor  # [T - V]
    vision_kinds: Tensor  # [V]
    patches: Tensor  # [P, d*d, 3*p*p] uint8
    positions: Tensor  # [T] position inside its prompt, modality order
    to_sequence: Tensor  # [T]: rows[to_sequence] is prompt after prompt
    to_rows: Tensor  # [T]: its inverse
    last_rows: Tensor  # [R] rows of the prompts' last tokens, those that are vision tokens first
    num_last_vision: int
    last_prompts: Tensor  # [R] prompt of each of the last rows
    to_prompts: Tensor  # [R]: its inverse

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each prompt begins in sequence order."""
        return tuple(np.cumsum((0, *self.lengths[:-1])).tolist())


def ragged(prompts: Sequence[Prompt], *, device: torch.device) -> RaggedPrompts:
    """Sort the tokens of all prompts by modality, each modality in sequence order."""
    kinds = np.concatenate([prompt.kinds for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    order = np.argsort(kinds == TEXT, kind="stable")  # sequence index of each row
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    last = inverse[np.cumsum(lengths) - 1]
    by_modality = np.argsort(last, kind="stable")  # vision rows have the smaller numbers
    num_vision = int(np.count_nonzero(kinds != TEXT))
    ids = np.concatenate([prompt.ids for prompt in prompts])
    positions = np.concatenate([np.arange(length) for length in lengths])

    def on_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return RaggedPrompts(
        num_vision=num_vision,
        lengths=tuple(lengths),
        text_ids=on_device(ids[kinds == TEXT]),
        vision_kinds=on_device(kinds[kinds != TEXT]),
        patches=on_device(np.concatenate([prompt.patches for prompt in prompts])),
        positions=on_device(positions[order]),
        to_sequence=on_device(inverse),
        to_rows=on_device(order),
        last_rows=on_device(last[by_modality]),
        num_last_vision=int(np.count_nonzero(last < num_vision)),
        last_prompts=on_device(by_modality),
        to_prompts=on_device(np.argsort(by_modality, kind="stable")),
    )
