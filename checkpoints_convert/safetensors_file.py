# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, read and written tensor by tensor.

Read: each tensor is a memory map of its own bytes, so that it costs the process no memory of its own and goes with the
tensor. Written: sizes and order are known before the first value, so the header goes first and every tensor
straight to its place; the file has the bytes that safetensors' own `save_file` would give it.
Format: https://huggingface.co/docs/safetensors (8 bytes length of the header, JSON header, data).
"""

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eve.errors import CheckpointError

Header = Mapping[str, Tensor]
"""Name -> tensor without data (device "meta"): shape and dtype."""

_DTYPES = {  # in the order in which safetensors stores them: largest element first
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGN = 8  # of the header
_MAX_HEADER = 100_000_000  # the format's own limit


class SafetensorsFile:
    """The tensors of a file by name; opening it reads the header only.

    Raises: CheckpointError if the file is missing, cut off, or no safetensors file, if its tensors do not lie one
    behind the other up to its end (as the format asks), or if it holds another dtype than floating point."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            length, content = _read_header(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error
        self._data_start = 8 + length
        self._offsets: dict[str, tuple[int, int]] = {}
        self.headers: Header = {name: self._header(name, entry) for name, entry in content.items()}
        self._refuse_damaged(end=path.stat().st_size - self._data_start)

    def _refuse_damaged(self, *, end: int) -> None:
        before = 0
        for name, (start, stop) in sorted(self._offsets.items(), key=lambda item: item[1]):
            size = self.headers[name].nbytes
            if start != before or stop - start != size or stop > end:
                raise CheckpointError(
                    f"{self._path} is cut off or damaged: {name} lies at {start} to {stop} of {end} bytes and should "
                    f"have {size}, from {before} on; download it again."
                )
            before = stop
        if before != end:
            raise CheckpointError(
                f"{self._path} is damaged: its tensors end at {before} of {end} bytes; download it again."
            )

    def _header(self, name: str, entry: Any) -> Tensor:
        try:
            dtype = str(entry["dtype"])
            start, stop = (int(offset) for offset in entry["data_offsets"])
            header = torch.empty(entry["shape"], dtype=_DTYPES.get(dtype), device="meta")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._path} is damaged: its header says {entry!r} of {name}; download it again."
            ) from error
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._path}: {name} is {dtype}, expected one of {', '.join(_DTYPES)}; quantized checkpoints cannot "
                "be converted."
            )
        self._offsets[name] = (start, stop)
        return header

    def read(self, name: str) -> Tensor:
        """The tensor, backed by the file."""
        header = self.headers[name]
        start, stop = (self._data_start + offset for offset in self._offsets[name])
        data = mapped_bytes(self._path, start, stop - start)
        if start % header.element_size():  # another writer's order: elements across word boundaries
            data = data.clone()
        return data.view(header.dtype).reshape(header.shape)


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length of the JSON header and its entries. (safetensors' own reader maps the whole file, which fails for one that
    is larger than memory.)"""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER:
            raise ValueError("it is no safetensors file")
        content = json.loads(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("it is no safetensors file")
    content.pop("__metadata__", None)
    return length, content


def mapped_bytes(path: Path, start: int, count: int) -> Tensor:
    """`count` bytes of a file as a uint8 tensor [count] that holds a memory map of them.

    The map is private: a write to the tensor does not reach the file."""
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(), start - page + count, access=mmap.ACCESS_COPY, offset=page
        )
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=start - page)


def write_file(path: Path, headers: Header, read: Callable[[str], Tensor]) -> None:
    """Write a file of these tensors, asking `read` for each in the order of `headers`.

    Raises: CheckpointError if what is read is not what the header announces."""
    order = sorted(headers, key=lambda name: (_rank(headers[name]), name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, total = {}, 0
    for name in order:
        header = headers[name]
        starts[name], total = total, total + header.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [starts[name], total],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data_start = file.tell()
        for name in headers:
            file.seek(data_start + starts[name])
            _write(file, read(name), headers[name], name)
        file.truncate(data_start + total)


def _write(file: Any, tensor: Tensor, header: Tensor, name: str) -> None:
    if tensor.shape != header.shape or tensor.dtype != header.dtype:
        raise CheckpointError(
            f"Tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, announced as {header.dtype} "
            f"{list(header.shape)}."
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def _rank(header: Tensor) -> int:
    return list(_DTYPES).index(_DTYPE_NAMES[header.dtype])


__all__ = ["Header", "SafetensorsFile", "mapped_bytes", "write_file"]
