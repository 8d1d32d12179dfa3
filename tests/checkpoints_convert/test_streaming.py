# SPDX-License-Identifier: Apache-2.0
"""A conversion holds little more than the largest tensor, whatever the model's size; what it reads and writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_folder import SafetensorsFolder, TensorStream, write_safetensors
from checkpoints_convert.safetensors_file import SafetensorsFile, write_file
from megatron_eve.errors import CheckpointError
from tests.checkpoints_convert.streaming import peaks, write_large_folder

CONSTANT = 48 * 2**20
"""What a process takes besides the tensors: modules that a conversion imports, what malloc keeps."""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    sizes = write_large_folder(tmp_path / "hf")
    bound = 1.2 * sizes.largest + CONSTANT
    assert bound < 0.5 * sizes.total  # else the test would show nothing
    found = peaks(tmp_path)
    shutil.rmtree(tmp_path)
    assert found.pop("everything_at_once") > 0.95 * sizes.total  # the meter sees what it must see
    assert len(found) == 6
    assert {phase: peak for phase, peak in found.items() if peak > bound} == {}


MIXED = {
    "z.ü": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(7),
    "m": torch.randn(2, 2, 3).half(),
    "empty": torch.empty(0, 4),
    "b": torch.randn(4, 4).bfloat16(),
    "0": torch.randn(2).double(),
}


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """In whatever order the tensors come, of all dtypes, to the byte; and read as they were."""
    save_file(MIXED, tmp_path / "theirs", metadata={"format": "pt"})
    write_file(tmp_path / "ours", MIXED, MIXED.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    file = SafetensorsFile(tmp_path / "ours")
    assert file.headers.keys() == MIXED.keys()
    for name, tensor in MIXED.items():
        assert file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_a_tensor_that_is_read_can_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "file")
    SafetensorsFile(tmp_path / "file").read("a").zero_()
    assert torch.equal(load_file(tmp_path / "file")["a"], MIXED["a"])


def test_values_at_odd_addresses(tmp_path: Path) -> None:
    """Files of other writers need not keep the large elements first."""
    header = json.dumps(
        {
            "half": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
            "double": {"dtype": "F64", "shape": [1], "data_offsets": [2, 10]},
        }
    ).encode()
    values = torch.tensor([1.5], dtype=torch.float16), torch.tensor([2.5], dtype=torch.float64)
    data = b"".join(value.numpy().tobytes() for value in values)
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = SafetensorsFile(tmp_path / "file")
    assert (file.read("half").item(), file.read("double").item()) == (1.5, 2.5)
    assert file.read("double").data_ptr() % 8 == 0


def test_broken_files_are_refused(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"is cut off or damaged: .*download it again"):
        SafetensorsFile(tmp_path / "file")
    (tmp_path / "file").write_bytes(whole[:40])
    with pytest.raises(CheckpointError, match=r"file cannot be read .*download it again"):
        SafetensorsFile(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="it is no safetensors file"):
        SafetensorsFile(tmp_path / "file")
    with pytest.raises(CheckpointError, match="gone cannot be read"):
        SafetensorsFile(tmp_path / "gone")
    save_file({"packed": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"packed is U8, expected one of F64.*quantized"):
        SafetensorsFile(tmp_path / "file")


def test_shards_and_their_index(tmp_path: Path) -> None:
    stream = TensorStream(MIXED, MIXED.__getitem__)
    total = write_safetensors(tmp_path, stream, max_shard_bytes=64)
    assert total == sum(tensor.nbytes for tensor in MIXED.values())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder = SafetensorsFolder(tmp_path)
    assert folder.keys() == MIXED.keys()
    assert all(torch.equal(folder[name], tensor) for name, tensor in MIXED.items())

    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where = content["weight_map"].pop("a")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{where} holds 'a', which .* does not list there"):
        SafetensorsFolder(tmp_path)
    content["weight_map"] |= {"a": where, "absent": where}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{where} holds 'absent', but it does not"):
        SafetensorsFolder(tmp_path)


def test_what_is_read_must_be_what_was_announced(tmp_path: Path) -> None:
    wrong = {name: torch.zeros(2) for name in MIXED}
    with pytest.raises(CheckpointError, match=r"'z.ü' is torch.float32 \[2\], announced as"):
        write_file(tmp_path / "file", MIXED, wrong.__getitem__)
