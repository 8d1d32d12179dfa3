# SPDX-License-Identifier: Apache-2.0
"""Random access to the samples of one or several folders of MDS shards.

Comes in: folders written by data_prep (index.json and the shard files it names). Goes out: `Sample` by global index, or
without its image bytes, which then stay on disk. Samples are numbered source by source, shard by shard.
Refused at start: a folder, index or shard file that is missing, a shard file whose size is not the index's, another
format than MDS, compressed shards, another set of columns. mosaicml-streaming's Stream opens the index and its readers
decode the samples; every read opens the file itself and keeps no position, so threads may share a table.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.row import IMAGE_COLUMNS, MDS_COLUMNS, from_row, header_from_row
from megatron_eve.data.sample import Sample
from megatron_eve.data.streaming_import import Stream, World, mds_decode
from megatron_eve.errors import DataError

_INDEX_NAME = "index.json"
_READ_AHEAD_BYTES = 4096
_ADVICE = "build the folder with `python -m data_prep build-shards`, or correct data.sources"


@dataclass(frozen=True, slots=True)
class ShardTable:
    """Samples of several sources, numbered through."""

    folders: tuple[Path, ...]  # one per source
    readers: tuple[Any, ...]  # streaming's reader of each shard, all sources
    shard_begins: NDArray[np.int64]  # [num_shards + 1] global index of each shard's first sample
    source_shards: NDArray[np.int64]  # [num_sources + 1] first shard of each source

    @classmethod
    def open(cls, folders: Sequence[str | Path]) -> "ShardTable":
        """Open and check every folder. Raises DataError naming what is missing or wrong."""
        paths = tuple(Path(folder) for folder in folders)
        readers_of = [_open_readers(path) for path in paths]
        readers = tuple(reader for readers in readers_of for reader in readers)
        begins = np.cumsum([0, *(reader.samples for reader in readers)], dtype=np.int64)
        source_shards = np.cumsum([0, *map(len, readers_of)], dtype=np.int64)
        return cls(folders=paths, readers=readers, shard_begins=begins, source_shards=source_shards)

    def __len__(self) -> int:
        return int(self.shard_begins[-1])

    @property
    def num_sources(self) -> int:
        return len(self.folders)

    def source_of(self, index: int) -> int:
        """Number of the source that holds the sample at a global index."""
        shard, _ = self._locate(index)
        return int(np.searchsorted(self.source_shards, shard, side="right")) - 1

    def source_range(self, source: int) -> tuple[int, int]:
        """(first, one past the last) global sample index of a source."""
        shards = self.source_shards[source : source + 2]
        begin, end = self.shard_begins[shards].tolist()
        return begin, end

    def source_shard_begins(self, source: int) -> NDArray[np.int64]:
        """[num_shards + 1] global index at which each shard of a source begins; the last entry is its end."""
        first, last = self.source_shards[source : source + 2].tolist()
        return self.shard_begins[first : last + 1]

    def read(self, index: int) -> Sample:
        """The sample at a global index. Raises DataError naming the shard file if it cannot be read."""
        shard, row = self._locate(index)
        try:
            return from_row(self.readers[shard][row])
        except DataError:
            raise
        except Exception as error:  # streaming raises whatever the damage leads to
            raise self._read_error(index, error) from error

    def read_header(self, index: int) -> Sample:
        """The sample without image bytes (`images` is empty, `image_sizes` is not): tens of times less to read.

        Raises DataError naming the shard file if it cannot be read."""
        shard, row = self._locate(index)
        try:
            return header_from_row(_read_columns(self.readers[shard], row, skip=IMAGE_COLUMNS))
        except DataError:
            raise
        except Exception as error:
            raise self._read_error(index, error) from error

    def shard_path(self, index: int) -> Path:
        """The file that holds a sample."""
        shard, _ = self._locate(index)
        return _file_of(self.readers[shard])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise DataError(f"sample index {index} is outside of 0..{len(self) - 1}")
        shard = int(np.searchsorted(self.shard_begins, index, side="right")) - 1
        return shard, index - int(self.shard_begins[shard])

    def _read_error(self, index: int, error: Exception) -> DataError:
        return DataError(
            f"{self.shard_path(index)}: sample {index} cannot be read ({type(error).__name__}: {error}); "
            "the file changed or is damaged since the run started: copy it again or rebuild the shards."
        )


def _open_readers(folder: Path) -> list[Any]:
    """Streaming's readers of a folder's shards, after checking that every file is there and whole."""
    index = folder / _INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: shard folder not found; {_ADVICE}.")
    if not index.is_file():
        raise DataError(f"{index}: not found, so this is no finished shard folder; {_ADVICE}.")
    stream = Stream(
        local=str(folder), download_retry=0, download_timeout=60, validate_hash=None, keep_zip=True
    )
    try:
        this_process = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        readers: list[Any] = stream.get_shards(this_process, False)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise DataError(f"{index}: not a readable MDS index ({error!r}); {_ADVICE}.") from error
    if not readers:
        raise DataError(f"{index}: lists no shards; {_ADVICE}.")
    for reader in readers:
        _check_reader(reader)
    return readers


def _check_reader(reader: Any) -> None:
    path = _file_of(reader)
    columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
    if columns != MDS_COLUMNS:
        raise DataError(f"{path}: columns are {columns}, expected {MDS_COLUMNS}; {_ADVICE}.")
    if reader.compression is not None:
        raise DataError(
            f"{path}: shards are compressed with {reader.compression}, which random access does not "
            "support; images are compressed already, so write the shards without compression."
        )
    if not path.is_file():
        raise DataError(
            f"{path}: shard file not found, but index.json lists it; copy it again or {_ADVICE}."
        )
    found, expected = path.stat().st_size, reader.raw_data.bytes
    if found != expected:
        raise DataError(
            f"{path}: has {found:,} bytes, index.json says {expected:,}; copy it again or {_ADVICE}."
        )


def _file_of(reader: Any) -> Path:
    return Path(reader.dirname) / reader.raw_data.basename


def _read_columns(reader: Any, row: int, *, skip: Sequence[str]) -> dict[str, object]:
    """Decoded columns of one sample, without reading those in `skip` from disk.

    Layout of MDS (streaming/base/format/mds/writer.py): uint32 count, uint32 offsets [count + 1], ...; a sample is the
    uint32 sizes of its columns of variable size, then the columns in order.
    """
    descriptor = os.open(_file_of(reader), os.O_RDONLY)
    try:
        begin, end = np.frombuffer(os.pread(descriptor, 8, 4 * (1 + row)), np.uint32).tolist()
        head = os.pread(descriptor, min(end - begin, _READ_AHEAD_BYTES), begin)
        num_variable = sum(size is None for size in reader.column_sizes)
        sizes = iter(np.frombuffer(head[: 4 * num_variable], np.uint32).tolist())
        position = 4 * num_variable
        columns: dict[str, object] = {}
        for name, encoding, fixed in zip(
            reader.column_names, reader.column_encodings, reader.column_sizes, strict=True
        ):
            size = next(sizes) if fixed is None else fixed
            if name not in skip:
                whole = position + size <= len(head)
                data = head[position:] if whole else os.pread(descriptor, size, begin + position)
                columns[name] = mds_decode(encoding, data[:size])
            position += size
        return columns
    finally:
        os.close(descriptor)
