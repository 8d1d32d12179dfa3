# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that is not as the format asks is refused: its tensors would be other bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from checkpoints_convert.safetensors_file import SafetensorsFile
from megatron_eve.errors import CheckpointError

WHOLE = save({"a": torch.arange(4.0), "b": torch.arange(4.0)})
Entries = dict[str, Any]


def changed(change: Callable[[Entries], object], *, behind: bytes = b"") -> bytes:
    """The file with another header, and bytes behind its tensors."""
    length = int.from_bytes(WHOLE[:8], "little")
    entries = json.loads(WHOLE[8 : 8 + length])
    change(entries)
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + WHOLE[8 + length :] + behind


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(lambda e: e["b"].update(data_offsets=[-16, 0])), "b lies at -16 to 0 of 32"),
        (changed(lambda e: e["b"].update(data_offsets=[0, 16])), "[ab] lies at 0 to 16 of 32"),
        (changed(lambda e: e.pop("a")), "b lies at 16 to 32 of 32 bytes .* from 0 on"),
        (changed(lambda e: None, behind=b"junk"), "its tensors end at 32 of 36 bytes"),
        (changed(lambda e: e["b"].pop("dtype")), "its header says .* of b"),
        (changed(lambda e: e["b"].update(shape=[-4])), "its header says .* of b"),
        (changed(lambda e: e["b"].update(data_offsets=["x", 32])), "its header says .* of b"),
        (changed(lambda e: e.update(b=5)), "its header says 5 of b"),
    ],
)
def test_damaged_headers_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(path)
    with pytest.raises((SafetensorError, OverflowError)), safe_open(path, "pt"):
        pass  # the format's own reader refuses it too


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    assert torch.equal(SafetensorsFile(path).read("b"), torch.arange(4.0))
