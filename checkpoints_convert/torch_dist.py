# SPDX-License-Identifier: Apache-2.0
"""Tensors of megatron-core's `torch_dist` checkpoints without a model: written and read one at a time.

The format is torch.distributed.checkpoint's, with the decoder's layers stacked along a leading axis: the stored tensor
`decoder.layers.REST` [L, ...] holds `decoder.layers.{i}.REST` in its row i. A stored tensor lies in chunks, boxes of
it, each written by one process of the run that saved it.

Written: chunk by chunk, each made when its turn comes. Read: each chunk from a memory map of its bytes into the tensor
that was asked for. Sources: megatron.core.dist_checkpointing.strategies.torch, torch.distributed.checkpoint.filesystem.
The tests load what is written with dist_checkpointing.load, in other layouts.
"""

import contextlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_eve.errors import CheckpointError

from .safetensors_file import mapped_bytes

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACK = "decoder.layers."
_NOT_WEIGHTS = ("optimizer.",)
"""Beginnings of keys in a training checkpoint that hold no weights of the model."""

SHARD_SUFFIX = ".distcp"
_FILE = f"__0_0{SHARD_SUFFIX}"

Box = tuple[tuple[int, int], ...]
"""First row and one past the last of every dim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of an EveModel tensor, and how to get its values."""

    name: str  # of EveModel's tensor, with the layer's number
    rows: tuple[int, int]  # first dim; the others are whole
    read: Callable[[], Tensor]


def stored_key(name: str) -> tuple[str, int | None]:
    """The stored tensor that holds EveModel's tensor `name`, and its row in the stack of layers, if it is one."""
    match = _LAYER.fullmatch(name)
    return (_STACK + match[2], int(match[1])) if match else (name, None)


def write_tensors(
    folder: Path, headers: Mapping[str, Tensor], chunks: Sequence[Chunk], *, num_layers: int
) -> None:
    """Write the chunks, in their order, with one of them in memory at a time.

    `headers`: shape and dtype of every tensor (device "meta"), by name; the chunks cover them.
    """
    items = [_write_item(headers[chunk.name], chunk, num_layers=num_layers) for chunk in chunks]
    plan = DefaultSavePlanner(flatten_state_dict=False)
    _, metadata = plan.create_global_plan(
        [SavePlan(items)]
    )  # refuses chunks that overlap or leave holes
    metadata.storage_data = {}
    folder.mkdir(exist_ok=True)
    with (folder / _FILE).open("wb") as file, _without_zip_checksums():
        for item, chunk in zip(items, chunks, strict=True):
            start = file.tell()
            _save(item, chunk, file)
            metadata.storage_data[item.index] = _StorageInfo(_FILE, start, file.tell() - start)
    metadata.storage_meta = StorageMeta()
    metadata.version = CURRENT_DCP_VERSION
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def _save(item: WriteItem, chunk: Chunk, file: BinaryIO) -> None:
    assert item.tensor_data is not None
    value = chunk.read().detach().cpu().contiguous().reshape(item.tensor_data.chunk.sizes)
    if value.untyped_storage().nbytes() != value.nbytes:  # torch.save writes whole storages
        value = value.clone()
    torch.save(value, file)


@contextlib.contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """torch.load never looks at them, and to make them takes three times as long as everything else."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _write_item(header: Tensor, chunk: Chunk, *, num_layers: int) -> WriteItem:
    key, layer = stored_key(chunk.name)
    first, last = chunk.rows
    offset = [first, *(0 for _ in header.shape[1:])]
    shape, size = [last - first, *header.shape[1:]], list(header.shape)
    if layer is not None:
        offset, shape, size = [layer, *offset], [1, *shape], [num_layers, *size]
    return WriteItem(
        index=MetadataIndex(key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)),
            properties=TensorProperties(dtype=header.dtype),
            size=torch.Size(size),
        ),
    )


class StoredTensors(Mapping[str, Tensor]):
    """EveModel's tensors of a checkpoint by name, unsharded, each put together when it is asked for.

    What a training checkpoint holds besides (optimizer, random generators) is left out. `vocab_size`: rows beyond it,
    which only divide the table by the tensor-parallel size, are cut.
    """

    def __init__(self, folder: Path, *, vocab_size: int | None = None) -> None:
        self._folder = folder
        self._metadata = _read_metadata(folder)
        self._vocab_size = vocab_size
        self.headers: dict[str, Tensor] = {}
        for key, stored in self._metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and not key.startswith(_NOT_WEIGHTS):
                self.headers |= self._headers(key, stored)

    def _headers(self, key: str, stored: TensorStorageMetadata) -> dict[str, Tensor]:
        shape, dtype = tuple(stored.size), stored.properties.dtype
        if key.startswith(_STACK):
            names = self.parts_of(key)
            return {name: torch.empty(shape[1:], dtype=dtype, device="meta") for name in names}
        if self._vocab_size is not None and key in VOCABULARY:
            shape = (_without_padding(shape[0], self._vocab_size), *shape[1:])
        return {key: torch.empty(shape, dtype=dtype, device="meta")}

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, 0, self.headers[name].shape[0])

    def parts_of(self, key: str) -> list[str]:
        """Names of the tensors that lie in the stored tensor `key`: the layers of a stack in their order, or itself."""
        stored = self._metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            return []
        if not key.startswith(_STACK):
            return [key]
        return [f"{_STACK}{i}.{key.removeprefix(_STACK)}" for i in range(stored.size[0])]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """The rows from `first` to before `last` of a tensor.

        Mapped from the file if they lie there in one piece; its first value may then have any address."""
        header = self.headers[name][first:last]
        key, layer = stored_key(name)
        wanted: Box = ((first, last), *((0, length) for length in header.shape[1:]))
        if layer is not None:
            wanted = ((layer, layer + 1), *wanted)
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        found = [(c, box) for c in stored.chunks if (box := _common(c, wanted)) is not None]
        if len(found) == 1 and found[0][1] == wanted:
            data = self._bytes(key, found[0][0], wanted, header.element_size())
            if data.is_contiguous():
                return data.view(header.dtype).reshape(header.shape)
        tensor = torch.empty([b - a for a, b in wanted], dtype=header.dtype)
        whole, itemsize = tensor.view(torch.uint8), tensor.element_size()
        for chunk, box in found:
            target = _narrow(whole, box, start=[a for a, _ in wanted], itemsize=itemsize)
            target.copy_(self._bytes(key, chunk, box, itemsize))
        count = sum(torch.Size([b - a for a, b in box]).numel() for _, box in found)
        if count != header.numel():
            raise CheckpointError(
                f"{self._folder}: the chunks of {key!r} hold {count} of the {header.numel()} values of {name!r}, some "
                "twice or not at all; use another checkpoint."
            )
        return tensor.reshape(header.shape)

    def _bytes(self, key: str, chunk: ChunkStorageMetadata, box: Box, itemsize: int) -> Tensor:
        """A box of a chunk as bytes, the last dim as many times longer as a value has bytes."""
        return _narrow(self._chunk(key, chunk), box, start=chunk.offsets, itemsize=itemsize)

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A whole chunk as bytes."""
        index = MetadataIndex(key, chunk.offsets)
        info = self._metadata.storage_data[index]
        path = self._folder / info.relative_path
        stored = self._metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        try:
            return _mapped_tensor(path, info, chunk.sizes, stored.properties.dtype)
        except (OSError, zipfile.BadZipFile, KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {key!r} at {list(chunk.offsets)} cannot be read ({error}); use another checkpoint."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def _common(chunk: ChunkStorageMetadata, wanted: Box) -> Box | None:
    """The box that a chunk shares with another; None if there is none."""
    held = ((o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
    box = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(held, wanted, strict=True))
    return None if any(first >= last for first, last in box) else box


def _narrow(data: Tensor, box: Box, *, start: Sequence[int], itemsize: int) -> Tensor:
    """The bytes of a box, out of the bytes of values whose first one has the indices `start`."""
    widths = [1] * (len(box) - 1) + [itemsize]
    for dim, ((first, last), origin, width) in enumerate(zip(box, start, widths, strict=True)):
        data = data.narrow(dim, (first - origin) * width, (last - first) * width)
    return data


VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MAX_TENSOR_PARALLEL = 64


def _without_padding(found: int, vocab_size: int) -> int:
    """Rows without those that round the vocabulary up to a multiple of the tensor-parallel size."""
    is_padded = vocab_size < found < vocab_size + _MAX_TENSOR_PARALLEL
    return vocab_size if is_padded else found


def _read_metadata(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling raises whatever the bytes make it raise
        raise CheckpointError(
            f"{folder}/.metadata cannot be read ({type(error).__name__}: {error}); use another checkpoint."
        ) from error


def _mapped_tensor(path: Path, info: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The bytes of the tensor that `torch.save` wrote into `info.length` bytes of a file from `info.offset` on.

    Its values lie in the file as they are; they are mapped. A form that our writers do not produce is loaded."""
    with path.open("rb") as file:
        view = io.BufferedReader(_Part(file, info.offset, info.length))
        start, count = _values_in_zip(view)
        view.seek(0)
        with torch.serialization.skip_data():
            header = torch.load(view, weights_only=True)
        if header.shape != shape or header.dtype != dtype:
            raise ValueError(
                f"found {header.dtype} {list(header.shape)}, .metadata says {dtype} {list(shape)}"
            )
        if not header.is_contiguous() or count != shape.numel() * dtype.itemsize:
            view.seek(0)
            return torch.load(view, weights_only=True).contiguous().view(torch.uint8)
    data = mapped_bytes(path, info.offset + start, count)
    return data.reshape(*shape[:-1], shape[-1] * dtype.itemsize)


def _values_in_zip(view: BinaryIO) -> tuple[int, int]:
    """Where the values of the one storage in an archive of `torch.save` start, and how many bytes they are."""
    with zipfile.ZipFile(view) as archive:
        (entry,) = [e for e in archive.infolist() if re.fullmatch(r"[^/]+/data/\d+", e.filename)]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its values are compressed")
        view.seek(
            entry.header_offset + 26
        )  # of the local header: length of name and of the extra field
        lengths = view.read(4)
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return entry.header_offset + 30 + name + extra, entry.file_size


class _Part(io.RawIOBase):
    """A part of an open binary file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}
        self._at = origin[whence] + offset
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
