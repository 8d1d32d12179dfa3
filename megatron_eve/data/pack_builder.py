# SPDX-License-Identifier: Apache-2.0
"""A planned pack to a `Pack`: read the samples, decode their images, encode their text, assemble. Thread-safe.

A sample that turns out to be unusable keeps its planned place, without labels and with an entry for the report, so that
the plan, every shape and every other sample stay the same on all ranks. If an image cannot be decoded, its pixels are
mean-grey. If the row cannot be read, or is no longer the one whose tokens were counted, the planned numbers of vision
and text tokens are padding.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.assemble import (
    ExpandedSample,
    PackMember,
    assemble_pack,
    blank_sample,
    expand,
    pad_sample,
)
from megatron_eve.data.plan.lengths import LengthSettings, target_sizes
from megatron_eve.data.plan.packing import Item, PackShape, PlannedPack
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.image import ImageDecoder, ImageJob, Pixels
from megatron_eve.data.read.patches import patchify
from megatron_eve.data.read.quarantine import Quarantined, SampleError
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Pack, Sample

_MEAN_GREY = (122, 116, 104)
"""Pixels in place of an undecodable image: int(255 * CLIP mean), about 0 after normalisation (official dummy image)."""


class PackBuilder:
    """Turns planned packs into tensors; called from several threads at once."""

    def __init__(
        self,
        *,
        table: ShardTable,
        settings: Sequence[LengthSettings],
        tokenizer: Tokenizer,
        shape: PackShape,
        model: ModelConfig,
        device: Literal["cpu", "cuda"],
        exif_rotation: bool,
        step_places: int,
    ) -> None:
        self._step_places = step_places
        self._table = table
        self._settings = settings
        self._tokenizer = tokenizer
        self._shape = shape
        self._patch_stride, self._dense_stride = model.patch_stride, model.dense_stride
        self._device: Literal["cpu", "cuda"] = device
        self._exif_rotation = exif_rotation
        # asked here, because worker threads start on device 0 whatever this process chose
        self._device_id = torch.cuda.current_device() if device == "cuda" else 0
        # By thread, since a DALI pipeline serves one. Not threading.local(): should a library fork, the child
        # drops the other threads' locals, and the destructor of a DALI pipeline whose threads are not there
        # never returns.
        self._decoders: dict[int, ImageDecoder] = {}

    def build(self, planned: PlannedPack) -> tuple[Pack, list[Quarantined]]:
        """The pack, and the samples in it whose labels were masked."""
        placed = [self._placed(item) for item in planned]
        every_job = [job for one in placed for job in one.jobs]
        images = self._decoder().decode(every_job)
        members: list[PackMember] = []
        masked: list[Quarantined] = []
        of_sample = iter(images)
        for item, one in zip(planned, placed, strict=True):
            decoded = islice(of_sample, len(one.jobs))
            errors = [image for image in decoded if isinstance(image, SampleError)]
            error = one.error or (errors[0] if errors else None)
            if error is not None:
                file, row = self._table.place(item.sample)
                masked.append(
                    Quarantined(one.id, one.source, error.reason, error.message, str(file), row)
                )
            reason = error.reason if error else None
            members.append(PackMember(one.id, one.tokens, reason, item.place))
        pack = assemble_pack(
            members,
            patches=self._patches(images, every_job),
            shape=self._shape,
            pad_id=self._tokenizer.pad_id,
            step_places=self._step_places,
        )
        return pack, masked

    def _placed(self, item: Item) -> "_Placed":
        """A sample as the plan counted it, or its place without it."""
        name, source = self._table.name_of(item.sample), ""
        try:
            sample = self._table.read(item.sample)
            name, source = sample.id, sample.source
            settings = self._settings[self._table.source_of(item.sample)]
            jobs = self._jobs(sample, settings)
            return _Placed(name, source, self._tokens(item, sample, settings, jobs), jobs)
        except SampleError as error:
            tokens = blank_sample(item.num_vision, item.num_text, pad_id=self._tokenizer.pad_id)
            return _Placed(name, source, tokens, [], error)

    def _decoder(self) -> ImageDecoder:
        thread = threading.get_ident()
        if thread not in self._decoders:
            self._decoders[thread] = ImageDecoder(
                device=self._device, exif_rotation=self._exif_rotation, device_id=self._device_id
            )
        return self._decoders[thread]

    def _jobs(self, sample: Sample, settings: LengthSettings) -> list[ImageJob]:
        try:
            targets = target_sizes(sample, settings=settings)
        except SampleError as error:
            raise _changed(str(error)) from error
        return [
            ImageJob(data=data, source_size=source, target_size=target)
            for data, source, target in zip(sample.images, sample.image_sizes, targets, strict=True)
        ]

    def _tokens(
        self, item: Item, sample: Sample, settings: LengthSettings, jobs: Sequence[ImageJob]
    ) -> ExpandedSample:
        """The sample's tokens. Raises SampleError if they are not those that the plan counted."""
        try:
            encoded = encode_sample(
                sample.turns,
                num_images=len(jobs),
                template=settings.template,
                tokenizer=self._tokenizer,
                max_text_tokens=settings.max_text_tokens,
            )
        except SampleError as error:
            raise _changed(str(error)) from error
        edge = settings.pixels_per_token
        grids = [(job.target_size[0] // edge, job.target_size[1] // edge) for job in jobs]
        tokens = expand(encoded, grids=grids)
        padding = settings.padding(tokens.ids.size)
        tokens = pad_sample(tokens, padding, pad_id=self._tokenizer.pad_id)
        found = (int(np.count_nonzero(tokens.is_vision)), encoded.num_text + padding)
        if found != (item.num_vision, item.num_text):
            counted = (item.num_vision, item.num_text)
            raise _changed(f"{found} (vision, text) tokens, {counted} were counted")
        return tokens

    def _patches(self, images: Sequence[Pixels], jobs: Sequence[ImageJob]) -> NDArray[np.uint8]:
        """Patch rows of all images of a pack; mean-grey where an image could not be decoded."""
        patch, dense = self._patch_stride, self._dense_stride
        areas = [job.target_size[0] * job.target_size[1] for job in jobs]
        ends = np.cumsum([0, *areas]) // (patch * dense) ** 2
        patches = np.empty((ends[-1], dense**2, 3 * patch**2), np.uint8)
        for image, job, begin, end in zip(images, jobs, ends[:-1], ends[1:], strict=True):
            if isinstance(image, SampleError):
                image = np.full((*job.target_size, 3), _MEAN_GREY, np.uint8)
            patchify(image, patch_stride=patch, dense_stride=dense, out=patches[begin:end])
        return patches


@dataclass(frozen=True, slots=True)
class _Placed:
    """A planned sample, or what takes its place."""

    id: str
    source: str
    tokens: ExpandedSample
    jobs: Sequence[ImageJob]
    error: SampleError | None = None  # set: nothing of the row is used


def _changed(what: str) -> SampleError:
    return SampleError(
        "changed_row",
        f"not as it was when its tokens were counted, but its shard's index is: {what}",
    )
