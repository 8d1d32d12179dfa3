# SPDX-License-Identifier: Apache-2.0
"""Packs for the FLOP tests: samples of given sizes, in packs without padding or with about 1% of it."""

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.sample import IGNORE, Pack
from tests.support.reference_eve import IMAGE_PLACEHOLDER
from tests.support.tiny import RawSample, naive_pack

ALIGN = 8


def sample(*, grids: list[tuple[int, int]], text: int, prompt: int, edge: int = 4) -> RawSample:
    """Images of `grids` (rows, columns) of tokens, then `text` text tokens, the first `prompt` without label."""
    ids = torch.tensor([IMAGE_PLACEHOLDER] * len(grids) + [*range(1, text + 1)])
    labels: Tensor = ids.clone()
    labels[: len(grids) + prompt] = IGNORE
    images = tuple(torch.zeros((3, r * edge, c * edge), dtype=torch.uint8) for r, c in grids)
    return RawSample(ids, images, labels)


def full_pack(model: ModelConfig, *, stage: str) -> Pack:
    """1,280 tokens. 16 samples with one image of 64 tokens and 16 text tokens: no padding. The text stage: 24 texts of
    53 tokens and the one block of vision padding that every pack has."""
    if stage == "text":
        samples = [sample(grids=[], text=53, prompt=0)] * 24
    else:
        samples = [sample(grids=[(7, 8)], text=16, prompt=_prompt(stage))] * 16
    return naive_pack(samples, model=model, tokens=1280, align=ALIGN)


def padded_pack(model: ModelConfig, *, stage: str) -> Pack:
    """The same with samples of different sizes and 12 tokens of padding (the text stage: 13)."""
    if stage == "text":
        samples = [sample(grids=[], text=53, prompt=0)] * 23 + [sample(grids=[], text=48, prompt=0)]
    else:
        prompt = _prompt(stage)
        samples = [sample(grids=[(7, 8)], text=16, prompt=prompt)] * 13
        samples += [sample(grids=[(6, 8)], text=13, prompt=prompt)]
        samples += [sample(grids=[(3, 4), (5, 8)], text=22, prompt=prompt)]
        samples += [sample(grids=[(7, 8)], text=12, prompt=prompt)]
    return naive_pack(samples, model=model, tokens=1280, align=ALIGN)


def _prompt(stage: str) -> int:
    """Captions carry a label on every token, answers only behind their question."""
    return 4 if stage in ("2.2", "3") else 0
