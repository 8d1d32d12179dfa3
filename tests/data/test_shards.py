# SPDX-License-Identifier: Apache-2.0
"""Random access over several folders, and every damage named with its file."""

import concurrent.futures
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.streaming_import import MDSWriter
from megatron_eve.errors import DataError
from tests.data.conftest import WriteShards, mixed_samples


def test_sources_are_numbered_through(write_shards: WriteShards) -> None:
    first, second = mixed_samples(30), mixed_samples(20, start=30)
    table = ShardTable.open([write_shards("a", first), write_shards("b", second)])
    assert len(table) == 50
    assert [table.source_range(i) for i in range(table.num_sources)] == [(0, 30), (30, 50)]
    assert len(table.readers) > 4, "the test needs several shards per source"
    begins = table.source_shard_begins(1)
    assert begins[0] == 30
    assert begins[-1] == 50
    everything = first + second
    for index in (49, 0, 29, 30, 17):
        assert table.read(index) == everything[index]
        assert table.read_header(index) == dataclasses.replace(everything[index], images=())


def test_threads_share_a_table(write_shards: WriteShards) -> None:
    samples = mixed_samples(40)
    table = ShardTable.open([write_shards("a", samples)])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(table.read, list(range(40)) * 5)) == samples * 5


def test_index_outside(write_shards: WriteShards) -> None:
    table = ShardTable.open([write_shards("a", mixed_samples(3))])
    with pytest.raises(DataError, match=r"sample index 3 is outside of 0\.\.2"):
        table.read(3)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: shard folder not found; .*data\.sources"):
        ShardTable.open([tmp_path / "nowhere"])


def test_unfinished_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"index\.json: not found, so this is no finished shard"):
        ShardTable.open([tmp_path])


@pytest.mark.parametrize("text", ["{", "{}", '{"version": 2, "shards": []}', '{"shards": [{}]}'])
def test_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json: (not a readable MDS index|lists no shards)"):
        ShardTable.open([tmp_path])


def test_missing_and_short_shard_files_are_named(write_shards: WriteShards) -> None:
    """Their rows are lost, and only those that they really lack; the others can be read."""
    folder = write_shards("a", mixed_samples(30))
    whole = ShardTable.open([folder])
    expected = [whole.read(i) for i in range(len(whole))]
    begins = whole.shard_begins.tolist()
    missing, short = folder / "shard.00000.mds", folder / "shard.00001.mds"
    size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:-1])
    missing.unlink()
    table = ShardTable.open([folder])
    assert table.damaged[0] == f"{missing}: shard file not found, but index.json lists it"
    assert table.damaged[1] == f"{short}: has {size - 1:,} bytes, index.json says {size:,}"
    lost = [*range(begins[1]), begins[2] - 1]
    assert table.lost_samples() == lost
    for i, sample in enumerate(expected):
        if i not in lost:
            assert table.read(i) == sample
            continue
        for read in (table.read, table.read_header):
            with pytest.raises(SampleError, match=r"mds: row \d+ cannot be read") as refused:
                read(i)
            assert refused.value.reason == "unreadable_file"


def test_an_index_that_lists_another_number_of_samples_is_refused(
    write_shards: WriteShards,
) -> None:
    """Rows that the index does not list would be missing without a word."""
    folder = write_shards("a", mixed_samples(10), shard_bytes=1 << 20)
    index = json.loads((folder / "index.json").read_text())
    for wrong in (9, 11):
        index["shards"][0]["samples"] = wrong
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match=f"holds 10 samples, index.json says {wrong}"):
            ShardTable.open([folder]).check_count(0)


def test_a_damaged_byte_of_the_index_never_ends_in_a_traceback(write_shards: WriteShards) -> None:
    folder = write_shards("a", mixed_samples(4), shard_bytes=1 << 20)
    path = folder / "index.json"
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x15]) + content[at + 1 :])
        with contextlib.suppress(DataError):  # SampleError is one
            refused += 1
            table = ShardTable.open([folder])
            table.check_count(0)
            for i in range(len(table)):
                table.read(i)
            refused -= 1
    assert refused > len(content) // 6


def test_shards_of_other_columns_are_refused(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "x"), columns={"text": "str"}) as writer:
        writer.write({"text": "hello"})
    with pytest.raises(DataError, match=r"columns are \{'text': 'str'\}, expected"):
        ShardTable.open([tmp_path / "x"])


def test_compressed_shards_are_refused(write_shards: WriteShards) -> None:
    folder = write_shards("a", mixed_samples(3))
    index = json.loads((folder / "index.json").read_text())
    shard = index["shards"][0]
    shard.update(compression="zstd", zip_data=shard["raw_data"])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="shards are compressed with zstd"):
        ShardTable.open([folder])
