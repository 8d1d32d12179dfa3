# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a Hugging Face folder: one file, or shards with an index.

Reading is lazy: a tensor is mapped when it is asked for. Writing streams: one tensor is in memory at a time.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_eve.errors import CheckpointError
from megatron_eve.inference.weights import read_index

from .disk import WriteBack
from .safetensors_file import Header, SafetensorsFile, write_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # transformers' default


class SafetensorsFolder(Mapping[str, Tensor]):
    """Name -> tensor of a folder's safetensors files, each mapped from its file when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = _file_of_each_tensor(folder, self._files)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._file_of[name]].read(name)

    def headers(self) -> dict[str, Tensor]:
        """Shape and dtype of every tensor as a tensor without data (device "meta")."""
        return {name: self._files[file].headers[name] for name, file in self._file_of.items()}

    def dtype(self, *, but: re.Pattern[str] | None = None) -> torch.dtype:
        """The dtype of all tensors `but` those with such a name. Raises CheckpointError if they differ."""
        found = {
            header.dtype: name
            for name, header in self.headers().items()
            if but is None or not but.fullmatch(name)
        }
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


class TensorStream(Iterable[tuple[str, Tensor]]):
    """Tensors whose names, shapes and dtypes are known before their values, which are read one at a time.

    `headers`: in the order in which reading is cheapest."""

    def __init__(self, headers: Header, read: Callable[[str], Tensor]) -> None:
        self.headers = headers
        self.read = read

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.headers:
            yield name, self.read(name)


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the tensors, shard by shard in the order they come; returns their total size in bytes.

    A TensorStream is written with one tensor in memory at a time; anything else is taken to be in memory already."""
    if not isinstance(tensors, TensorStream):
        held = dict(tensors)
        tensors = TensorStream(held, held.__getitem__)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, header in tensors.headers.items():
        if shards[-1] and size + header.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = header
        size += header.nbytes
    weight_map: dict[str, str] = {}
    with WriteBack() as disk:
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SINGLE_FILE if len(shards) == 1 else name
            write_file(folder / file, shard, tensors.read)
            disk.sync(folder / file)
            weight_map |= dict.fromkeys(shard, file)
    total = sum(header.nbytes for shard in shards for header in shard.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return total


def _file_of_each_tensor(folder: Path, opened: dict[str, SafetensorsFile]) -> dict[str, str]:
    """Tensor -> name of its file; the files are opened into `opened`."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_index(index)
        for name in sorted(set(weight_map.values())):
            opened[name] = SafetensorsFile(folder / name)
            _check_index(index, weight_map, file=name, held=set(opened[name].headers))
        return weight_map
    if not (folder / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face folder with safetensors "
            "(convert *.bin files with transformers' save_pretrained first)."
        )
    opened[SINGLE_FILE] = SafetensorsFile(folder / SINGLE_FILE)
    return dict.fromkeys(opened[SINGLE_FILE].headers, SINGLE_FILE)


def _check_index(index: Path, weight_map: dict[str, str], *, file: str, held: set[str]) -> None:
    listed = {name for name, where in weight_map.items() if where == file}
    if missing := sorted(listed - held):
        raise CheckpointError(
            f"{index} says that {file} holds {missing[0]!r}, but it does not; download the folder again."
        )
    if extra := sorted(held - listed):
        raise CheckpointError(
            f"{file} holds {extra[0]!r}, which {index} does not list there; download the folder again."
        )
