# SPDX-License-Identifier: Apache-2.0
"""A stream of synthetic samples, and the two forms in which a step takes them: packs, and padded batches.

Sizes are drawn before scaling as web images and captions have them: the edge of an image (square root of its area) is
log-normal, its aspect ratio too, and the train-time rule caps its area; text is log-normal. Contents are random. With
the template `plain` every text token is a target, with `qwen2` half of them, and one sample in twenty has no image.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.assemble import ExpandedSample, PackMember, assemble_pack, expand
from megatron_eve.data.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.image_size import PIXELS_PER_TOKEN, train_size
from megatron_eve.data.packing import Item, PackShape, PlannedPack, pack_batch
from megatron_eve.data.patches import patchify
from megatron_eve.data.sample import IGNORE, Pack

_EDGE_MEDIAN = {800: 800.0, 1600: 1200.0}  # pixels, by the recipe's cap
_EDGE_SIGMA, _ASPECT_SIGMA = 0.4, 0.3
_LOOK_AHEAD = 32  # samples
_TEXT_MEDIAN, _TEXT_SIGMA, _TEXT_RANGE = 90.0, 0.6, (16, 400)


@dataclass(frozen=True, slots=True)
class BenchSample:
    """A sample before any batching."""

    encoded: EncodedSample
    images: tuple[NDArray[np.uint8], ...]  # [H, W, 3] each

    def expanded(self, *, pixels_per_token: int) -> ExpandedSample:
        """Its tokens with the images in place."""
        sizes = [image.shape[:2] for image in self.images]
        grids = [(h // pixels_per_token, w // pixels_per_token) for h, w in sizes]
        return expand(self.encoded, grids=grids)


def stream(config: RunConfig, *, token_share: float, seed: int) -> Iterator[BenchSample]:
    """Endless samples for this stage."""
    rng = np.random.default_rng(seed)
    questions = config.data.template == "qwen2"
    while True:
        length = np.clip(_TEXT_MEDIAN * math.exp(_TEXT_SIGMA * rng.normal()), *_TEXT_RANGE)
        ids = rng.integers(0, config.model.vocab_size, max(4, round(length * token_share)))
        labels = ids.copy()
        if questions:
            labels[: ids.size // 2] = IGNORE
        images: tuple[NDArray[np.uint8], ...] = ()
        if not questions or rng.random() > 1 / 20:
            images = (_image(config, token_share=token_share, rng=rng),)
            ids = np.concatenate([[IMAGE_PLACEHOLDER], ids])
            labels = np.concatenate([[IGNORE], labels])
        yield BenchSample(EncodedSample(ids=ids, labels=labels, was_cut=False), images)


def _image(config: RunConfig, *, token_share: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    scale = math.sqrt(token_share)
    edge = _EDGE_MEDIAN[config.data.image_edge] * math.exp(_EDGE_SIGMA * rng.normal()) * scale
    stretch = math.exp(_ASPECT_SIGMA * rng.normal() / 2)
    size = train_size(
        round(edge * stretch), round(edge / stretch), edge=round(config.data.image_edge * scale)
    )
    pixels = config.model.pixels_per_token
    height, width = (side // PIXELS_PER_TOKEN * pixels for side in size)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The samples of one optimizer step, as packed and in stream order."""

    packs: tuple[tuple[BenchSample, ...], ...]
    in_stream_order: tuple[BenchSample, ...]


def steps_of_packs(
    config: RunConfig, samples: Iterator[BenchSample], *, packs_per_step: int
) -> Iterator[StepSamples]:
    """Steps that fill `packs_per_step` packs, by the trainer's best fit.

    A step takes samples in stream order while they fit; one that does not waits for the next step, and after
    `_LOOK_AHEAD` such samples the step is full."""
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    pixels = config.model.pixels_per_token
    waiting: list[BenchSample] = []
    while True:
        chosen: list[BenchSample] = []
        items: list[Item] = []
        plan: list[PlannedPack] = []
        passed: list[BenchSample] = []
        while len(passed) < _LOOK_AHEAD:
            sample = waiting.pop(0) if waiting else next(samples)
            tokens = sample.expanded(pixels_per_token=pixels)
            num_vision = int(tokens.is_vision.sum())
            item = Item(len(chosen), num_vision, int(tokens.ids.size) - num_vision)
            if not shape.fits(item.num_vision, item.num_text):
                continue  # longer than a pack: the trainer leaves it out, too
            longer = pack_batch([*items, item], shape=shape)
            if len(longer) > packs_per_step:
                passed.append(sample)
                continue
            chosen.append(sample)
            items.append(item)
            plan = longer
        waiting = passed + waiting
        yield StepSamples(
            packs=tuple(tuple(chosen[item.sample] for item in pack) for pack in plan),
            in_stream_order=tuple(chosen),
        )


def as_pack(samples: Sequence[BenchSample], *, config: RunConfig) -> Pack:
    """One micro-batch of the trainer."""
    model = config.model
    members = [
        PackMember(str(i), sample.expanded(pixels_per_token=model.pixels_per_token), None)
        for i, sample in enumerate(samples)
    ]
    patch, dense = model.patch_stride, model.dense_stride
    patches = [
        patchify(image, patch_stride=patch, dense_stride=dense)
        for sample in samples
        for image in sample.images
    ]
    return assemble_pack(
        members,
        patches=np.concatenate([np.empty((0, dense**2, 3 * patch**2), np.uint8), *patches]),
        shape=PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align),
        pad_id=0,
    )
