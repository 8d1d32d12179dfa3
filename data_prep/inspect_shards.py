# SPDX-License-Identifier: Apache-2.0
"""Rows of a shard folder as text for people: id, source, images (format, size, bytes) and turns."""

import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from megatron_eve.data.read.row import from_row
from megatron_eve.data.read.streaming_import import reader_from_json
from megatron_eve.data.sample import Sample
from megatron_eve.errors import DataError

from .verify_shards import read_index


def iterate_samples(folder: Path) -> Iterator[Sample]:
    """All samples of a shard folder, in the order of the index."""
    for shard in read_index(folder)["shards"]:
        reader = reader_from_json(str(folder), None, shard)
        for number in range(shard["samples"]):
            yield from_row(reader[number])


def find_samples(folder: Path, *, sample_id: str) -> list[Sample]:
    """The samples with this id (ids of a data set need not be unique). Raises DataError if there is none."""
    found = [sample for sample in iterate_samples(folder) if sample.id == sample_id]
    if not found:
        raise DataError(
            f"{folder} has no sample {sample_id!r}; look for it in quarantine.jsonl, or list ids "
            "with --limit."
        )
    return found


def describe(sample: Sample) -> list[str]:
    """The lines to print for one sample."""
    lines = [f"id {sample.id} | source {sample.source} | {len(sample.images)} images"]
    for data, (height, width) in zip(sample.images, sample.image_sizes, strict=True):
        lines.append(f"  image {_format(data)} {height} x {width} (h x w), {len(data):,} bytes")
    lines += [f"  {turn.role}: {turn.text!r}" for turn in sample.turns]
    return lines


def _format(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        return str(image.format)
