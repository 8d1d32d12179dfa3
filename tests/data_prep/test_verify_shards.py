# SPDX-License-Identifier: Apache-2.0
"""Damage to a shard folder is found and named."""

import json
import re
import shutil
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.inspect_shards import describe, find_samples
from data_prep.verify_shards import verify_shards
from megatron_eve.data.read.image import image_size
from megatron_eve.errors import DataError
from tests.data_prep.pictures import write_dataset


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    data = write_dataset(folder / "input", num_samples=12)
    out = folder / "shards"
    assert main(["build-shards", str(data), str(data.parent), str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture
def shards(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "shards")


SHARD = "part-00000/shard.00000.mds"


def test_a_good_folder_has_no_problems(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify_shards(shards)
    assert (result.num_shards, result.num_samples, result.problems) == (1, 10, [])
    assert main(["verify", str(shards)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_a_flipped_byte_is_found_anywhere(shards: Path) -> None:
    path = shards / SHARD
    original = path.read_bytes()
    for position in (0, 100, len(original) // 2, len(original) - 1):
        damaged = bytearray(original)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        (problem,) = verify_shards(shards).problems
        assert problem.startswith(f"{SHARD}: xxh3_64 is")
    assert main(["verify", str(shards)]) == 1


def test_a_missing_shard_is_found(shards: Path) -> None:
    (shards / SHARD).unlink()
    assert verify_shards(shards).problems == [f"{SHARD}: missing"]
    assert main(["verify", str(shards)]) == 1


def test_a_cut_shard_is_found(shards: Path) -> None:
    content = (shards / SHARD).read_bytes()
    (shards / SHARD).write_bytes(content[:-1])
    (problem,) = verify_shards(shards).problems
    assert f"{len(content) - 1:,} bytes, the index says {len(content):,}" in problem


def test_a_shard_outside_the_index_is_found(shards: Path) -> None:
    shutil.copy(shards / SHARD, shards / "part-00000/shard.00001.mds")
    assert verify_shards(shards).problems == ["part-00000/shard.00001.mds: not in the index"]


def test_a_shard_that_is_named_twice_is_found(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(index | {"shards": index["shards"] * 2}))
    assert f"{SHARD}: twice in the index" in verify_shards(shards).problems


def test_counts_must_agree(shards: Path) -> None:
    content = json.loads((shards / "dataset.json").read_text())
    content["counts"]["samples"] = 11
    (shards / "dataset.json").write_text(json.dumps(content))
    assert verify_shards(shards).problems == ["dataset.json: 11 samples, the shards hold 10"]


def test_lost_quarantine_lines_are_found(shards: Path) -> None:
    (shards / "quarantine.jsonl").write_text("")
    (problem,) = verify_shards(shards).problems
    assert problem.startswith("quarantine.jsonl: {}")
    (shards / "quarantine.jsonl").write_text("{\n")
    (problem,) = verify_shards(shards).problems
    assert problem.startswith("quarantine.jsonl: line 1")


def test_a_row_that_does_not_decode_is_found(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(row: object) -> None:
        raise DataError("image_ends do not fit")

    monkeypatch.setattr("data_prep.verify_shards.from_row", refuse)
    problems = verify_shards(shards).problems
    assert len(problems) == 10
    assert problems[0] == f"{SHARD}: row 0: DataError: image_ends do not fit"


def test_a_row_that_says_another_size_is_found(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of pictures that an earlier build did not turn."""
    content = json.loads((shards / "dataset.json").read_text())
    (shards / "dataset.json").write_text(
        json.dumps(content | {"options": {"exif_rotation": False}})
    )
    asked: list[bool] = []

    def sideways(data: bytes, *, exif_rotation: bool) -> tuple[int, int]:
        asked.append(exif_rotation)
        height, width = image_size(data, exif_rotation=exif_rotation)
        return (width, height) if len(asked) == 3 else (height, width)

    monkeypatch.setattr("data_prep.verify_shards.image_size", sideways)
    (problem,) = verify_shards(shards).problems
    assert re.search(r"row \d+, image-\d+: the image is \d+ x 48, the row says 48 x \d+$", problem)
    assert set(asked) == {False}


def test_an_incomplete_folder_is_refused(shards: Path) -> None:
    (shards / "index.json").unlink()
    with pytest.raises(DataError, match=r"has no index\.json"):
        verify_shards(shards)
    (shards / "index.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        verify_shards(shards)


def test_inspect_prints_a_sample(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = find_samples(shards, sample_id="image-1")
    lines = describe(found)
    assert lines[0] == "id image-1 | source data | 1 images"
    assert lines[1].startswith("  image JPEG 48 x 49 (h x w), ")
    assert lines[2] == "  human: '<image>\\nWhat is it?'"
    assert main(["inspect", str(shards), "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("id ") == 2
    assert main(["inspect", str(shards), "--sample", "absent"]) == 1
