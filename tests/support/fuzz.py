# SPDX-License-Identifier: Apache-2.0
"""Random packs that look for the edges: one modality missing, one token, no label, no sample, segments just full."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.sample import IGNORE, image_token_count
from tests.support.canonical import Shard
from tests.support.reference_eve import IMAGE_PLACEHOLDER
from tests.support.tiny import RawSample

TOKENS, ALIGN, SAMPLE_ALIGN = 64, 8, 4
VOCABULARY, EDGE = 61, 4  # of tiny_model
Part = int | tuple[int, int]  # so many text tokens, or the rows and columns of an image
Plan = tuple[Part, ...]  # of one sample
LARGEST, BLOCK = (5, 10), (1, 6)  # images of TOKENS - ALIGN and of ALIGN tokens


def fuzz_step(number: int, *, num_packs: int) -> list[list[RawSample]]:
    """The samples of each pack of the step with this number; every tenth step has no label at all."""
    rng = np.random.default_rng([4, number])
    labelled = 0.0 if number % 10 == 9 else 0.6
    return [fuzz_pack(rng, labelled=labelled) for _ in range(num_packs)]


def fuzz_pack(rng: np.random.Generator, *, labelled: float) -> list[RawSample]:
    """Samples of one pack of one of the kinds below."""
    kind = list(KINDS)[rng.integers(len(KINDS))]
    if kind == "all masked":
        labelled = 0.0
    return [_sample(plan, rng, labelled=labelled) for plan in _that_fit(KINDS[kind](rng))]


def _mixed(rng: np.random.Generator) -> list[Plan]:
    return [_mixed_sample(rng) for _ in range(rng.integers(1, 8))]


def _mixed_sample(rng: np.random.Generator) -> Plan:
    texts: list[Part] = [int(rng.integers(1, 9)) for _ in range(rng.integers(1, 3))]
    for image in _images(rng, int(rng.integers(0, 3))):
        texts.insert(int(rng.integers(0, len(texts) + 1)), image)
    return tuple(texts)


def _images(rng: np.random.Generator, count: int) -> list[Part]:
    return [(int(rng.integers(1, 4)), int(rng.integers(1, 4))) for _ in range(count)]


KINDS: dict[str, Callable[[np.random.Generator], list[Plan]]] = {
    "mixed": _mixed,
    "all masked": _mixed,
    "text only": lambda rng: [(int(rng.integers(1, 20)),) for _ in range(6)],
    "image only": lambda rng: [tuple(_images(rng, 2)) for _ in range(4)],
    "one token": lambda rng: [(1,)],
    "padding only": lambda rng: [],
    "largest image first": lambda rng: [(LARGEST, 8)],
    "largest image last": lambda rng: [(8, LARGEST)],
    "one block of vision": lambda rng: [(4, BLOCK, 4), (40,)],
    "one block of text": lambda rng: [(*_images(rng, 3), 4), (*_images(rng, 2), 4)],
    "images first": lambda rng: [(*_images(rng, 2), int(rng.integers(1, 6))) for _ in range(4)],
    "images last": lambda rng: [(int(rng.integers(1, 6)), *_images(rng, 2)) for _ in range(4)],
}


def _that_fit(plans: Sequence[Plan]) -> list[Plan]:
    fit: list[Plan] = []
    vision = text = 0
    for plan in plans:
        num_vision = sum(_vision_tokens(p) for p in plan if not isinstance(p, int))
        num_text = sum(p for p in plan if isinstance(p, int))
        num_text += -(num_vision + num_text) % SAMPLE_ALIGN
        blocks = [max(-(-n // ALIGN), 1) for n in (vision + num_vision, text + num_text)]
        if sum(blocks) * ALIGN <= TOKENS:
            fit.append(plan)
            vision, text = vision + num_vision, text + num_text
    return fit


def _vision_tokens(image: tuple[int, int]) -> int:
    rows, cols = image
    return image_token_count(rows * EDGE, cols * EDGE, pixels_per_token=EDGE)


def _sample(plan: Plan, rng: np.random.Generator, *, labelled: float) -> RawSample:
    ids: list[int] = []
    images = []
    for part in plan:
        if isinstance(part, int):
            ids += rng.integers(0, VOCABULARY, part).tolist()
        else:
            ids.append(IMAGE_PLACEHOLDER)
            pixels = rng.integers(0, 256, (3, part[0] * EDGE, part[1] * EDGE), dtype=np.uint8)
            images.append(torch.from_numpy(pixels))
    tokens = torch.tensor(ids)
    learnt = torch.from_numpy(rng.random(len(ids)) < labelled) & (tokens != IMAGE_PLACEHOLDER)
    return RawSample(tokens, tuple(images), torch.where(learnt, tokens, IGNORE))


def gradients_of_fuzz_steps(
    config: RunConfig, weights: str, numbers: Sequence[int], num_packs: int
) -> list[list[Shard]]:
    """This rank's gradients of each step, in a gloo worker."""
    from tests.support.matrix import Check, accumulate

    steps = [fuzz_step(number, num_packs=num_packs) for number in numbers]
    return accumulate([Check(config=config, weights=weights, packs=packs) for packs in steps])
