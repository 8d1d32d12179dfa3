# SPDX-License-Identifier: Apache-2.0
"""How a `Sample` lies in a row of an MDS shard. `to_row` and `from_row` are inverse; nothing else
knows the columns.

MDS cannot store an array without elements, so both array columns start with one entry for "before
the first image": `image_ends` is [0, end of image 0, end of image 1, ...] in bytes of `images`, and
`image_sizes` is [0, 0, height 0, width 0, height 1, width 1, ...]. A text-only sample has [0] and
[0, 0].
"""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from megatron_eve.data.sample import Sample, Turn
from megatron_eve.errors import DataError

MDS_COLUMNS: dict[str, str] = {
    "id": "str",
    "images": "bytes",
    "image_ends": "ndarray:uint64",
    "image_sizes": "ndarray:uint32",
    "conversations": "json",
    "source": "str",
}
"""Column name -> MDS encoding, as MDSWriter takes them."""
IMAGE_COLUMNS = ("images", "image_ends")
"""Columns that only `from_row` needs."""


def to_row(sample: Sample) -> dict[str, object]:
    """The row that MDSWriter stores. Raises DataError if the sample has not one size per image."""
    if len(sample.images) != len(sample.image_sizes):
        raise DataError(
            f"sample {sample.id!r}: {len(sample.images)} images but {len(sample.image_sizes)} image_sizes; "
            "give one (height, width) per image."
        )
    return {
        "id": sample.id,
        "images": b"".join(sample.images),
        "image_ends": np.cumsum([0, *map(len, sample.images)], dtype=np.uint64),
        "image_sizes": np.asarray([(0, 0), *sample.image_sizes], dtype=np.uint32).reshape(-1),
        "conversations": [{"from": turn.role, "value": turn.text} for turn in sample.turns],
        "source": sample.source,
    }


def from_row(row: Mapping[str, object]) -> Sample:
    """The sample in a row that an MDS reader returned. Raises DataError if the columns do not fit each other."""
    header = header_from_row(row)
    data = row["images"]
    assert isinstance(data, bytes)  # the encoding gives nothing else
    ends = np.asarray(row["image_ends"]).tolist()
    if (
        ends != sorted(ends)
        or ends[0] != 0
        or ends[-1] != len(data)
        or len(ends) != len(header.image_sizes) + 1
    ):
        raise DataError(
            f"sample {header.id!r}: image_ends {ends} and {len(header.image_sizes)} image_sizes do not "
            f"fit {len(data)} bytes of images; the shard is damaged or was not written by data_prep."
        )
    images = tuple(data[begin:end] for begin, end in itertools.pairwise(ends))
    return dataclasses.replace(header, images=images)


def header_from_row(row: Mapping[str, object]) -> Sample:
    """The sample without its images (`images` is empty, `image_sizes` is not); needs no image column."""
    missing = sorted(set(MDS_COLUMNS) - set(IMAGE_COLUMNS) - set(row))
    if missing:
        raise DataError(
            f"MDS row lacks the columns {missing}, it has {sorted(row)}; build the shards with data_prep."
        )
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"conversations are {turns!r:.60}, not a list; the shard is damaged.")
    sizes = np.asarray(row["image_sizes"]).reshape(-1, 2).tolist()
    return Sample(
        id=str(row["id"]),
        images=(),
        image_sizes=tuple((height, width) for height, width in sizes[1:]),
        turns=tuple(map(_turn, turns)),
        source=str(row["source"]),
    )


def _turn(value: object) -> Turn:
    """Raises DataError unless it has a role and a text that UTF-8 can write, as the tokenizer needs it."""
    role, text = (
        (value.get("from"), value.get("value")) if isinstance(value, dict) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(text, str):
        raise DataError(f"a turn is {value!r:.60}; the shard is damaged.")
    text.encode()
    return Turn(role=role, text=text)
