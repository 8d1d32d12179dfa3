# SPDX-License-Identifier: Apache-2.0
"""What a build chose, against what a run is told."""

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.verify_shards import verify_shards
from megatron_eve.data.read.shard_record import check_exif_rotation
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.errors import ConfigError, DataError
from tests.data_prep.pictures import sample
from tests.support.hard_pictures import turned


def record(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "dataset.json").write_text(text)
    return folder


def test_the_same_choice_passes_and_another_is_refused(tmp_path: Path) -> None:
    turned = record(tmp_path / "turned", {"options": {"exif_rotation": True}})
    not_turned = record(tmp_path / "not", {"options": {"exif_rotation": False}})
    older = record(tmp_path / "older", {"options": {"source": "x"}})
    check_exif_rotation([turned, older, tmp_path], exif_rotation=True)
    check_exif_rotation([not_turned], exif_rotation=False)
    with pytest.raises(
        ConfigError, match=r"data.exif_rotation=true, but .*not/dataset.json .*with --exif"
    ):
        check_exif_rotation([turned, not_turned], exif_rotation=True)
    with pytest.raises(ConfigError, match=r"older/dataset.json .*true; .*with --no-exif-rotation"):
        check_exif_rotation([older], exif_rotation=False)


@pytest.mark.parametrize("content", ["{", "[]", {"options": {"exif_rotation": "yes"}}])
def test_a_record_that_says_nothing_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(DataError, match=r"dataset\.json"):
        check_exif_rotation([record(tmp_path, content)], exif_rotation=True)


def test_what_build_shards_was_told_reaches_the_rows_and_the_loader(tmp_path: Path) -> None:
    """A picture that lies on its side, built both ways: sizes in the rows, and the run that may read them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(turned()["exif 6"])
    (tmp_path / "data.json").write_text(json.dumps([sample("a", "a.jpg")]))
    sizes = {}
    for flag, exif_rotation in (("--exif-rotation", True), ("--no-exif-rotation", False)):
        out = tmp_path / flag
        paths = [str(path) for path in (tmp_path / "data.json", tmp_path / "images", out)]
        assert main(["build-shards", *paths, flag, "--workers", "1"]) == 0
        check_exif_rotation([out], exif_rotation=exif_rotation)
        with pytest.raises(ConfigError, match=r"data\.exif_rotation"):
            check_exif_rotation([out], exif_rotation=not exif_rotation)
        sizes[exif_rotation] = ShardTable.open([out]).read(0).image_sizes
        assert verify_shards(out).problems == []
    assert sizes == {True: ((96, 64),), False: ((64, 96),)}
