# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a Hugging Face folder: one file, or shards with an index.

Reading is lazy: a tensor is read when it is asked for. Writing streams: at most one shard is in memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_eve.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_SHARD_BYTES = 5_000_000_000  # transformers' default


class SafetensorsFolder(Mapping[str, Tensor]):
    """Name -> tensor of a folder's safetensors files; each access reads from disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = _file_of_each_tensor(folder)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = _open(self._folder / file)
        return self._files[file]

    def header(self, name: str) -> Tensor:
        """Shape and dtype of a tensor as a tensor without data (device "meta"); reads no weights."""
        part = self._file(name).get_slice(name)
        return torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")

    def headers(self) -> dict[str, Tensor]:
        """`header` of every tensor."""
        return {name: self.header(name) for name in self}

    def dtype(self) -> torch.dtype:
        """The dtype of all tensors. Raises CheckpointError if they differ."""
        found = {header.dtype: name for name, header in self.headers().items()}
        if len(found) != 1:
            listing = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            raise CheckpointError(
                f"{self._folder} mixes dtypes: {listing}; choose one with --dtype."
            )
        return next(iter(found))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the tensors in the order they come; returns their total size in bytes."""
    shards: list[dict[str, int]] = []  # of each shard: tensor name -> bytes
    pending: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if pending and size + bytes_ > max_shard_bytes:
            shards.append(_write_shard(folder, pending, number=len(shards) + 1))
            pending, size = {}, 0
        pending[name] = tensor.contiguous()
        size += bytes_
    shards.append(_write_shard(folder, pending, number=len(shards) + 1))
    return _name_shards(folder, shards)


def _write_shard(folder: Path, tensors: dict[str, Tensor], *, number: int) -> dict[str, int]:
    save_file(tensors, _unnamed(folder, number), metadata={"format": "pt"})
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def _unnamed(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.partial"


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> int:
    """Give the shards their final names, which hold the number of shards, and write the index."""
    total = sum(sum(shard.values()) for shard in shards)
    if len(shards) == 1:
        _unnamed(folder, 1).rename(folder / SINGLE_FILE)
        return total
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _unnamed(folder, number).rename(folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _file_of_each_tensor(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name in sorted(set(weight_map.values())):
            missing = set(_names_of(weight_map, name)) - set(_open(folder / name).keys())
            if missing:
                raise CheckpointError(
                    f"{index} says that {name} holds {sorted(missing)[0]!r}, but it does not; download the folder "
                    "again."
                )
        return weight_map
    if not (folder / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face folder with safetensors "
            "(convert *.bin files with transformers' save_pretrained first)."
        )
    return dict.fromkeys(_open(folder / SINGLE_FILE).keys(), SINGLE_FILE)


def _names_of(weight_map: dict[str, str], file: str) -> list[str]:
    return [name for name, where in weight_map.items() if where == file]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error
