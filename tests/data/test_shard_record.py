# SPDX-License-Identifier: Apache-2.0
"""What a build chose, against what a run is told."""

import json
from pathlib import Path

import pytest

from megatron_eve.data.shard_record import check_exif_rotation
from megatron_eve.errors import ConfigError, DataError


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
