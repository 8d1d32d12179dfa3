# SPDX-License-Identifier: Apache-2.0
"""A sample survives the way through an MDS shard; damaged rows are named."""

import dataclasses

import numpy as np
import pytest

from megatron_eve.data.read.row import from_row, to_row
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.sample import Sample, Turn
from megatron_eve.errors import DataError
from tests.data.conftest import WriteShards

TURNS = (Turn("human", "<image> naïve? 你好"), Turn("gpt", "yes\n"))
TWO_IMAGES = Sample("a", (b"123", b"45"), ((3, 4), (5, 6)), TURNS, "web")
TEXT_ONLY = Sample("b", (), (), TURNS, "text")


def test_samples_survive_a_shard(write_shards: WriteShards) -> None:
    samples = [TWO_IMAGES, TEXT_ONLY, dataclasses.replace(TWO_IMAGES, id="c")]
    table = ShardTable.open([write_shards("shards", samples)])
    assert [table.read(i) for i in range(len(table))] == samples


def test_row_without_one_size_per_image_is_refused() -> None:
    broken = dataclasses.replace(TWO_IMAGES, image_sizes=((3, 4),))
    with pytest.raises(DataError, match="'a': 2 images but 1 image_sizes"):
        to_row(broken)


def test_row_whose_columns_disagree_is_refused() -> None:
    row = to_row(TWO_IMAGES)
    row["image_ends"] = np.array([0, 3, 6], np.uint64)
    with pytest.raises(DataError, match=r"'a': image_ends \[0, 3, 6\] .* 5 bytes"):
        from_row(row)


def test_row_of_another_layout_is_refused() -> None:
    with pytest.raises(DataError, match=r"lacks the columns .*image_sizes.*data_prep"):
        from_row({"id": "x", "images": b""})
