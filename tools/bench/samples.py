# SPDX-License-Identifier: Apache-2.0
"""A stream of synthetic samples, and the two forms in which a step takes them: packs, and padded batches.

Sizes are drawn before scaling as web images and captions have them: the edge of an image (square root of its area) is
log-normal, its aspect ratio too, and the train-time rule caps its area; text is log-normal. Contents are random. With
the template `plain` every text token is a target, with `qwen2` half of them, and one sample in eight has no image.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.assemble import ExpandedSample, PackMember, assemble_pack, expand
from megatron_eve.data.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.image_size import PIXELS_PER_TOKEN, train_size
from megatron_eve.data.packing import PackCost, PackShape
from megatron_eve.data.patches import patchify
from megatron_eve.data.sample import IGNORE, Pack
from megatron_eve.data.stream_packer import StreamPacker

_EDGE_MEDIAN = {800: 800.0, 1600: 1200.0}  # pixels, by the recipe's cap
_EDGE_SIGMA, _ASPECT_SIGMA = 0.4, 0.3
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
        if not questions or rng.random() > 1 / 8:
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
    """Steps of full packs, made by the trainer's own online packer out of the stream."""
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    packer = StreamPacker(
        shape=shape,
        cost=PackCost.of_model(config.model, trainable=config.stage.trainable),
        max_tokens=config.data.open_bins * shape.pack_tokens,
    )
    seen: list[BenchSample] = []
    while True:
        numbers = []
        for _ in range(packs_per_step):
            _fill(packer, seen, samples, shape=shape, config=config)
            numbers.append([item.sample for item in packer.take()])
        yield StepSamples(
            packs=tuple(tuple(seen[i] for i in pack) for pack in numbers),
            in_stream_order=tuple(seen[i] for i in sorted(itertools.chain(*numbers))),
        )


def _fill(
    packer: StreamPacker,
    seen: list[BenchSample],
    samples: Iterator[BenchSample],
    *,
    shape: PackShape,
    config: RunConfig,
) -> None:
    """Samples into the pool until it is full; a sample that no pack holds is left out."""
    while True:
        sample = next(samples)
        tokens = sample.expanded(pixels_per_token=config.model.pixels_per_token)
        num_vision = int(tokens.is_vision.sum())
        num_text = int(tokens.ids.size) - num_vision
        if not shape.fits(num_vision, num_text):
            continue
        is_room = packer.accepts(np.array([num_vision + num_text])) > 0
        if not is_room:
            return
        seen.append(sample)
        packer.add(
            np.array([len(seen) - 1]),
            num_vision=np.array([num_vision]),
            num_text=np.array([num_text]),
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
