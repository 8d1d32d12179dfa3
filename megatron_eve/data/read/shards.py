# SPDX-License-Identifier: Apache-2.0
"""Random access to the samples of one or several folders of MDS shards.

Comes in: folders written by data_prep (index.json and the shard files it names). Goes out: `Sample` by global index,
or without its image bytes, which then stay on disk. Samples are numbered source by source, shard by shard. Refused at
start: a missing or damaged folder or index, another format than MDS, compressed shards, other columns. A shard file
that is missing or has another size than in the index is noted (`damaged`), and an unreadable row is a SampleError; the
caller decides how many a run bears. mosaicml-streaming's Stream opens the index, its encodings decode the columns;
every read opens the file itself and keeps no position, so threads may share a table.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.read.quarantine import Reason, SampleError
from megatron_eve.data.read.reading import Patience, ShortRead, settled
from megatron_eve.data.read.row import IMAGE_COLUMNS, MDS_COLUMNS, from_row, header_from_row
from megatron_eve.data.read.streaming_import import Stream, World, mds_decode
from megatron_eve.data.sample import Sample
from megatron_eve.errors import DataError

_INDEX_NAME = "index.json"
_READ_AHEAD_BYTES = 4096
_ADVICE = "build the folder with `megatron-eve data build-shards`, or correct data.sources"


@dataclass(frozen=True, slots=True)
class ShardTable:
    """Samples of several sources, numbered through."""

    folders: tuple[Path, ...]  # one per source
    readers: tuple[Any, ...]  # streaming's reader of each shard, all sources
    shard_begins: NDArray[np.int64]  # [num_shards + 1] global index of each shard's first sample
    source_shards: NDArray[np.int64]  # [num_sources + 1] first shard of each source
    damaged: Mapping[int, str] = field(default_factory=dict)  # shard -> what is wrong with its file
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def open(cls, folders: Sequence[str | Path]) -> "ShardTable":
        """Open every folder. Raises DataError naming what is missing or wrong with a folder as a whole."""
        patience = Patience()
        paths = tuple(Path(folder) for folder in folders)
        readers_of = [_open_readers(path, patience=patience) for path in paths]
        readers = tuple(reader for readers in readers_of for reader in readers)
        damaged = settled(readers, _file_problem, pauses_s=patience.pauses_s)
        for shard in damaged:
            patience.give_up(_file_of(readers[shard]))  # it has been waited for
        return cls(
            folders=paths,
            readers=readers,
            shard_begins=np.cumsum([0, *(reader.samples for reader in readers)], dtype=np.int64),
            source_shards=np.cumsum([0, *map(len, readers_of)], dtype=np.int64),
            damaged=damaged,
            patience=patience,
        )

    def __len__(self) -> int:
        return int(self.shard_begins[-1])

    @property
    def num_sources(self) -> int:
        return len(self.folders)

    def source_of(self, index: int) -> int:
        """Number of the source that holds the sample at a global index."""
        shard, _ = self._locate(index)
        return int(np.searchsorted(self.source_shards, shard, side="right")) - 1

    def shard_of(self, index: int) -> int:
        """Number of the shard, over all sources."""
        return self._locate(index)[0]

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
        """The sample at a global index. Raises SampleError naming file and row if it cannot be read."""
        return self._read(index, skip=(), sample_of=from_row)

    def read_header(self, index: int) -> Sample:
        """The sample without image bytes (`images` is empty, `image_sizes` is not): tens of times less to read.

        Raises SampleError naming file and row if it cannot be read."""
        return self._read(index, skip=IMAGE_COLUMNS, sample_of=header_from_row)

    def place(self, index: int) -> tuple[Path, int]:
        """The file that holds a sample, and its row there."""
        shard, row = self._locate(index)
        return _file_of(self.readers[shard]), row

    def name_of(self, index: int) -> str:
        """A sample's name when its id is not known."""
        shard, row = self._locate(index)
        return f"{self.readers[shard].raw_data.basename} row {row}"

    def index_bytes(self, source: int) -> bytes:
        """A source's index.json. It has sizes and hashes of all shards, and so changes with them."""
        path = self.folders[source] / _INDEX_NAME
        try:
            return self.patience.read(path, path.read_bytes)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); {_ADVICE}.") from error

    def lost_samples(self) -> list[int]:
        """Samples in files that were damaged when the table was opened."""
        lost: list[int] = []
        for shard in self.damaged:
            rows = _rows_beyond_the_end(self.readers[shard])
            lost += (self.shard_begins[shard] + rows).tolist()
        return lost

    def check_count(self, shard: int) -> None:
        """Raises DataError if index.json and a shard file that is whole disagree on its number of samples."""
        reader = self.readers[shard]
        path = _file_of(reader)
        try:
            found = self.patience.read(path, lambda: _count_in_file(reader))
        except OSError:
            return  # its rows will say so
        if found is not None and found != reader.samples:
            raise DataError(
                f"{path}: holds {found} samples, index.json says {reader.samples}: the index is damaged; "
                f"{_ADVICE} (a build that is complete only writes its index anew)."
            )

    def _read(
        self,
        index: int,
        *,
        skip: Sequence[str],
        sample_of: Callable[[Mapping[str, object]], Sample],
    ) -> Sample:
        shard, row = self._locate(index)
        reader = self.readers[shard]
        path = _file_of(reader)

        def read_once() -> Sample | Exception:
            try:
                return sample_of(_read_columns(reader, row, skip=skip))
            except OSError:
                raise
            except Exception as error:  # damaged bytes lead anywhere
                return error

        try:
            sample = self.patience.read(path, read_once)
            if isinstance(sample, Exception):  # of a network file system, perhaps only this time
                sample = self.patience.read(path, read_once)
        except OSError as error:
            raise _unreadable("unreadable_file", path, row, error) from error
        if isinstance(sample, Exception):
            raise _unreadable("damaged_row", path, row, sample) from sample
        return sample

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise DataError(f"sample index {index} is outside of 0..{len(self) - 1}")
        shard = int(np.searchsorted(self.shard_begins, index, side="right")) - 1
        return shard, index - int(self.shard_begins[shard])


def _unreadable(reason: Reason, path: Path, row: int, error: Exception) -> SampleError:
    return SampleError(
        reason, f"{path}: row {row} cannot be read ({type(error).__name__}: {error})"
    )


def _open_readers(folder: Path, *, patience: Patience) -> list[Any]:
    """Streaming's readers of a folder's shards, after checking that the index describes shards of ours."""
    index = folder / _INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: shard folder not found; {_ADVICE}.")
    if not index.is_file():
        raise DataError(f"{index}: not found, so this is no finished shard folder; {_ADVICE}.")
    stream = Stream(
        local=str(folder), download_retry=0, download_timeout=60, validate_hash=None, keep_zip=True
    )
    this_process = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    try:
        readers: list[Any] = patience.read(index, lambda: stream.get_shards(this_process, False))
        for reader in readers:
            _check_fields(reader)
    except OSError as error:
        raise DataError(f"{index}: cannot be read ({error}); {_ADVICE}.") from error
    except Exception as error:  # streaming raises whatever the damage leads to
        raise DataError(f"{index}: not a readable MDS index ({error!r}); {_ADVICE}.") from error
    if not readers:
        raise DataError(f"{index}: lists no shards; {_ADVICE}.")
    for reader in readers:
        _check_format(reader)
    return readers


def _check_fields(reader: Any) -> None:
    """Raises ValueError where a number or name of the index cannot be one."""
    numbers = {"samples": reader.samples, "bytes": reader.raw_data.bytes}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}")
    columns = (reader.column_names, reader.column_encodings, reader.column_sizes)
    if not all(isinstance(column, list) for column in columns) or len(set(map(len, columns))) > 1:
        raise ValueError(f"columns are {columns}")
    _file_of(reader)  # a name that is none


def _check_format(reader: Any) -> None:
    path = _file_of(reader)
    columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
    if columns != MDS_COLUMNS:
        raise DataError(f"{path}: columns are {columns}, expected {MDS_COLUMNS}; {_ADVICE}.")
    if reader.column_sizes != [None] * len(MDS_COLUMNS):
        raise DataError(
            f"{path}: column_sizes are {reader.column_sizes}, but every column of ours varies; {_ADVICE}."
        )
    if reader.compression is not None:
        raise DataError(
            f"{path}: shards are compressed with {reader.compression}, which random access does not "
            "support; images are compressed already, so write the shards without compression."
        )


def _file_problem(reader: Any) -> str | None:
    """What is wrong with a shard file, as far as the folder shows."""
    path = _file_of(reader)
    try:
        found, expected = path.stat().st_size, reader.raw_data.bytes
    except FileNotFoundError:
        return f"{path}: shard file not found, but index.json lists it"
    except OSError as error:
        return f"{path}: {error}"
    if found != expected:
        return f"{path}: has {found:,} bytes, index.json says {expected:,}"
    return None


def _rows_beyond_the_end(reader: Any) -> NDArray[np.int64]:
    """Rows of a shard that its file does not hold to their end; all where it holds no table of them."""
    try:
        with _file_of(reader).open("rb") as file:
            content = file.read(4 * (2 + reader.samples))
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return np.arange(reader.samples)
    if len(content) < 4 * (2 + reader.samples):
        return np.arange(reader.samples)
    ends = np.frombuffer(content, np.uint32)[2:]
    return np.flatnonzero(ends > size)


def _count_in_file(reader: Any) -> int | None:
    """The number of samples that a shard file claims, if its table confirms it."""
    path, expected = _file_of(reader), reader.raw_data.bytes
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if os.fstat(descriptor).st_size != expected:
            return None
        found = int(np.frombuffer(_pread(descriptor, 4, 0), np.uint32)[0])
        if 4 * (2 + found) > expected:
            return None
        end = int(np.frombuffer(_pread(descriptor, 4, 4 * (1 + found)), np.uint32)[0])
        return found if end == expected else None
    finally:
        os.close(descriptor)


def _file_of(reader: Any) -> Path:
    return Path(reader.dirname) / reader.raw_data.basename


def _read_columns(reader: Any, row: int, *, skip: Sequence[str]) -> dict[str, object]:
    """Decoded columns of one sample, without reading those in `skip` from disk.

    Layout of MDS (streaming/base/format/mds/writer.py): uint32 count, uint32 offsets [count + 1], ...; a sample is the
    uint32 sizes of its columns, all of variable size, then the columns in order.
    Raises: OSError; ValueError, and whatever else an encoding does with damaged bytes.
    """
    num_columns = len(reader.column_names)
    descriptor = os.open(_file_of(reader), os.O_RDONLY)
    try:
        begin, end = np.frombuffer(_pread(descriptor, 8, 4 * (1 + row)), np.uint32).tolist()
        if not begin + 4 * num_columns <= end <= reader.raw_data.bytes:
            raise ValueError(f"bytes {begin} to {end} are no row")
        if end > os.fstat(descriptor).st_size:
            raise ShortRead(f"the file ends before the row does, at byte {end}")
        head = _pread(descriptor, min(end - begin, _READ_AHEAD_BYTES), begin)
        sizes = np.frombuffer(head[: 4 * num_columns], np.uint32).tolist()
        if 4 * num_columns + sum(sizes) != end - begin:
            raise ValueError(f"columns of {sizes} bytes in a row of {end - begin}")
        position = 4 * num_columns
        columns: dict[str, object] = {}
        for name, encoding, size in zip(
            reader.column_names, reader.column_encodings, sizes, strict=True
        ):
            if name not in skip:
                whole = position + size <= len(head)
                data = head[position:] if whole else _pread(descriptor, size, begin + position)
                columns[name] = mds_decode(encoding, data[:size])
            position += size
        return columns
    finally:
        os.close(descriptor)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """So many bytes of a file. Raises: ShortRead."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise ShortRead(
                f"{len(data)} of {size} bytes at {offset}: the file ends there or before"
            )
        data += more
    return data
