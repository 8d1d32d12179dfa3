# SPDX-License-Identifier: Apache-2.0
"""A stream of synthetic samples, and the two forms in which a step takes them: packs, and padded batches.

Sizes are drawn before scaling as web images and captions have them: the edge of an image (square root of its area) is
log-normal, its aspect ratio too, and the train-time rule caps its area; text is log-normal. Contents are random. With
the template `plain` every text token is a target, with `qwen2` half of them, and one sample in twenty has no image.

Order: random, as the official sampler of stages 1 to 2.2 has it, or that of the official stage 3
(`--group_by_modality_length`; eve_trainer.py:13-66, facts observed, no code taken). There a megabatch, as many samples
as an optimizer step, is of one modality, sorted by words (an image counts nothing) and dealt out so that micro-batches
have about equally many words. With two samples in each, the longest comes with the shortest: what is alike is the sum,
so the grouping evens out the GPUs' work and does not save padding.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.assemble import ExpandedSample, PackMember, assemble_pack, expand
from megatron_eve.data.plan.packing import Item, PackShape, PlannedPack, pack_batch
from megatron_eve.data.read.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.read.image_size import PIXELS_PER_TOKEN, train_size
from megatron_eve.data.read.patches import patchify
from megatron_eve.data.sample import IGNORE, Pack
from tools.bench.report import BenchmarkError
from tools.bench.setting import OfficialBatch

_EDGE_MEDIAN = {800: 800.0, 1600: 1200.0}  # pixels, by the recipe's cap
_EDGE_SIGMA, _ASPECT_SIGMA = 0.4, 0.3
_LOOK_AHEAD = 32  # micro-batches
_TEXT_ONLY = 1 / 20  # with the template `qwen2`
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


@dataclass(frozen=True, slots=True)
class SampleSize:
    """What a sample's place in the order depends on, before it has contents."""

    num_text: int
    image: tuple[int, int] | None  # (height, width), in pixels of the scaled model


def stream(
    config: RunConfig, *, token_share: float, seed: int, official: OfficialBatch | None = None
) -> Iterator[BenchSample]:
    """Endless samples for this stage; with `official`, in the order of that script's sampler, in which each
    `micro_batch` samples are a micro-batch of one GPU."""
    sizes_rng, order_rng, contents_rng = np.random.default_rng(seed).spawn(3)
    sizes = _Sizes(config, token_share=token_share, rng=sizes_rng)
    if official is None or not official.grouped_by_length:
        order = _in_random_order(sizes)
    else:
        order = _grouped_by_length(sizes, official=official, rng=order_rng)
    for size in order:
        yield _sample(size, config=config, rng=contents_rng)


class _Sizes:
    """Draws sizes; see the module docstring."""

    def __init__(self, config: RunConfig, *, token_share: float, rng: np.random.Generator) -> None:
        self._config, self._token_share, self._rng = config, token_share, rng

    def has_image(self) -> bool:
        """Whether the next sample has one."""
        return self._config.data.template == "plain" or self._rng.random() > _TEXT_ONLY

    def draw(self, *, with_image: bool) -> SampleSize:
        length = np.clip(_TEXT_MEDIAN * math.exp(_TEXT_SIGMA * self._rng.normal()), *_TEXT_RANGE)
        num_text = max(4, round(length * self._token_share))
        return SampleSize(num_text, self._image() if with_image else None)

    def _image(self) -> tuple[int, int]:
        data, scale = self._config.data, math.sqrt(self._token_share)
        edge = _EDGE_MEDIAN[data.image_edge] * math.exp(_EDGE_SIGMA * self._rng.normal()) * scale
        stretch = math.exp(_ASPECT_SIGMA * self._rng.normal() / 2)
        height, width = train_size(
            round(edge * stretch), round(edge / stretch), edge=round(data.image_edge * scale)
        )
        pixels = self._config.model.pixels_per_token
        return height // PIXELS_PER_TOKEN * pixels, width // PIXELS_PER_TOKEN * pixels


def _in_random_order(sizes: _Sizes) -> Iterator[SampleSize]:
    while True:
        yield sizes.draw(with_image=sizes.has_image())


def _grouped_by_length(
    sizes: _Sizes, *, official: OfficialBatch, rng: np.random.Generator
) -> Iterator[SampleSize]:
    """Micro-batch by micro-batch what any of the GPUs gets, over many optimizer steps.

    Each micro-batch is one of a whole megabatch of its modality. Which modality is drawn anew for each, so that few
    micro-batches have the share of text that the official run has over many steps (there a step is of one modality).
    The stream is endless, so there is no mixed rest, which the official sampler puts at the end of an epoch."""
    ready: dict[bool, list[list[SampleSize]]] = {True: [], False: []}
    while True:
        with_image = sizes.has_image()
        if not ready[with_image]:
            drawn = [sizes.draw(with_image=with_image) for _ in range(official.global_batch)]
            dealt = even_micro_batches(
                [size.num_text for size in drawn], micro_batch=official.micro_batch
            )
            ready[with_image] = [[drawn[i] for i in dealt[j]] for j in rng.permutation(len(dealt))]
        yield from ready[with_image].pop()


def even_micro_batches(words: Sequence[int], *, micro_batch: int) -> list[list[int]]:
    """Deal a megabatch out as the official sampler does: which of its samples form each micro-batch.

    Longest first, each to the micro-batch with the fewest words so far that is not full, of equals the first.
    Source: split_to_even_chunks and get_length_grouped_indices, eve_trainer.py:13-32 and 69-80.
    """
    count, rest = divmod(len(words), micro_batch)
    assert not rest, f"{len(words)} samples do not fill micro-batches of {micro_batch}"
    dealt: list[list[int]] = [[] for _ in range(count)]
    not_full = [(0, number) for number in range(count)]  # a heap: words so far, micro-batch
    for i in sorted(range(len(words)), key=lambda i: -words[i]):
        so_far, number = heapq.heappop(not_full)
        dealt[number].append(i)
        if len(dealt[number]) < micro_batch:
            heapq.heappush(not_full, (so_far + words[i], number))
    return dealt


def _sample(size: SampleSize, *, config: RunConfig, rng: np.random.Generator) -> BenchSample:
    ids = rng.integers(0, config.model.vocab_size, size.num_text)
    labels = ids.copy()
    if config.data.template == "qwen2":
        labels[: ids.size // 2] = IGNORE
    images: tuple[NDArray[np.uint8], ...] = ()
    if size.image:
        images = (rng.integers(0, 256, (*size.image, 3), dtype=np.uint8),)
        ids = np.concatenate([[IMAGE_PLACEHOLDER], ids])
        labels = np.concatenate([[IGNORE], labels])
    return BenchSample(EncodedSample(ids=ids, labels=labels, was_cut=False), images)


@dataclass(frozen=True, slots=True)
class StepSamples:
    """The samples of one optimizer step, as packed and in stream order."""

    packs: tuple[tuple[BenchSample, ...], ...]
    in_stream_order: tuple[BenchSample, ...]


def steps_of_packs(
    config: RunConfig,
    samples: Iterator[BenchSample],
    *,
    packs_per_step: int,
    micro_batch: int = 1,
) -> Iterator[StepSamples]:
    """Steps of whole micro-batches, each `micro_batch` samples in stream order, that fill `packs_per_step` packs.

    A step takes the oldest micro-batches while two more of any size have room, then, as the trainer's packer does, the
    pair (or the one) of the next `_LOOK_AHEAD` that fills it best. Inside, samples share packs by best fit; one that is
    longer than a pack is left out with its micro-batch.

    Raises: BenchmarkError if not one micro-batch fits into a step.
    """
    room = _Room(config, packs_per_step=packs_per_step)
    groups = (room.group(samples, micro_batch=micro_batch) for _ in itertools.count())
    usable = (group for group in groups if group.fits)
    waiting: list[_Group] = []
    while True:
        waiting += itertools.islice(usable, _LOOK_AHEAD - len(waiting))
        chosen: list[_Group] = []
        while sum(g.num_tokens for g in chosen) + _largest_pair(waiting) <= room.num_tokens:
            chosen.append(waiting.pop(0))
            waiting.append(next(usable))
        added, plan = room.fill(chosen, waiting)
        waiting = [group for group in waiting if group not in added]
        step = [sample for group in (*chosen, *added) for sample in group.samples]
        yield StepSamples(
            packs=tuple(tuple(step[item.sample] for item in pack) for pack in plan),
            in_stream_order=tuple(step),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A micro-batch with its (vision, text) tokens by sample."""

    samples: tuple[BenchSample, ...]
    tokens: tuple[tuple[int, int], ...]
    fits: bool

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.tokens))


def _largest_pair(groups: Sequence[_Group]) -> int:
    return sum(sorted(group.num_tokens for group in groups)[-2:])


class _Room:
    """The packs of a step, to be filled with micro-batches."""

    def __init__(self, config: RunConfig, *, packs_per_step: int) -> None:
        self._packs_per_step = packs_per_step
        self._pixels_per_token = config.model.pixels_per_token
        self._shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
        self.num_tokens = packs_per_step * config.data.pack_tokens

    def group(self, samples: Iterator[BenchSample], *, micro_batch: int) -> _Group:
        """The next samples, counted."""
        members = tuple(itertools.islice(samples, micro_batch))
        tokens = []
        for sample in members:
            expanded = sample.expanded(pixels_per_token=self._pixels_per_token)
            num_vision = int(expanded.is_vision.sum())
            tokens.append((num_vision, int(expanded.ids.size) - num_vision))
        return _Group(members, tuple(tokens), all(self._shape.fits(*one) for one in tokens))

    def fill(
        self, chosen: Sequence[_Group], waiting: Sequence[_Group]
    ) -> tuple[tuple[_Group, ...], list[PlannedPack]]:
        """One or two of `waiting` with which the step has most tokens, and its packs."""
        room = self.num_tokens - sum(group.num_tokens for group in chosen)
        candidates = itertools.chain(
            ((one,) for one in waiting), itertools.combinations(waiting, 2)
        )
        sized = [(sum(g.num_tokens for g in groups), groups) for groups in candidates]
        fitting = [(tokens, groups) for tokens, groups in sized if tokens <= room]
        for _, groups in sorted(fitting, key=lambda one: -one[0]):
            plan = self._plan([*chosen, *groups])
            if len(plan) <= self._packs_per_step:
                return groups, plan
        plan = self._plan(chosen)
        if not chosen or len(plan) > self._packs_per_step:
            raise BenchmarkError(
                f"{self._packs_per_step} packs of {self._shape.pack_tokens} tokens do not hold a micro-batch of "
                f"{len(waiting[0].samples)} samples; take more packs a step."
            )
        return (), plan

    def _plan(self, groups: Sequence[_Group]) -> list[PlannedPack]:
        sizes = [size for group in groups for size in group.tokens]
        items = [Item(i, *size) for i, size in enumerate(sizes)]
        return pack_batch(items, shape=self._shape)


def as_pack(samples: Sequence[BenchSample], *, config: RunConfig) -> Pack:
    """One micro-batch of the trainer."""
    model = config.model
    members = [
        PackMember(str(i), sample.expanded(pixels_per_token=model.pixels_per_token), None, i)
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
        step_places=max(1, len(members)),
    )
