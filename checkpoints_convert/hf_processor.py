# SPDX-License-Identifier: Apache-2.0
"""An EVE folder's facts about its images beside config.json, read and compared with it.

The patch geometry may stand in config.json (ours), in preprocessor_config.json at the top (ours) or in the folder that
`mm_vision_tower` names (official), and the label of that folder ends in the patch size. Where two of them have it, they
must agree. The statistics of the normalisation must be those of training."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.config.pixels import CLIP_MEAN, CLIP_STD
from megatron_eve.errors import CheckpointError

_STRIDES = ("patch_stride", "dense_stride")
_STATISTICS = (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
_PATCH_OF_LABEL = re.compile(r"-patch(\d+)$")
_FILE = "preprocessor_config.json"


def with_processor(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """config.json's fields, with the strides from a file beside it.

    Raises: CheckpointError where two files disagree, or pixels are normalised in another way than here."""
    content = dict(content)
    said_by = {name: "config.json" for name in _STRIDES if content.get(name) is not None}
    for path, found in _files(folder, content):
        for name in _STRIDES:
            if name not in found:
                continue
            if name in said_by and content[name] != found[name]:
                raise CheckpointError(
                    f"{path}: {name} is {found[name]!r}, but {said_by[name]} says {content[name]!r}; keep the one that "
                    "the model was trained with in both."
                )
            content[name] = found[name]
            said_by.setdefault(name, str(path))
        for name, expected in _STATISTICS:
            if name in found and found[name] != list(expected):
                raise CheckpointError(
                    f"{path}: {name} is {found[name]!r}, expected {list(expected)}: images would be normalised in "
                    "another way than the model was trained with."
                )
    label = _PATCH_OF_LABEL.search(str(content.get("mm_vision_tower")))
    if label and "patch_stride" in said_by and int(label[1]) != content["patch_stride"]:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_vision_tower is {content['mm_vision_tower']!r}, but "
            f"{said_by['patch_stride']} says patch_stride {content['patch_stride']!r}; keep the one that the model was "
            "trained with."
        )
    return content


def _files(folder: Path, content: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Image processors inside the folder: at the top, and the one that mm_vision_tower names."""
    if (folder / _FILE).is_file():
        yield folder / _FILE, read_object(folder / _FILE)
    tower = (folder / str(content.get("mm_vision_tower")) / _FILE).resolve()
    if tower.is_relative_to(folder.resolve()) and tower.is_file():
        found = read_object(tower)
        try:
            yield tower, found | {name: int(found[name]) for name in _STRIDES}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{tower} does not say patch_stride and dense_stride ({error}); write it again."
            ) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a Hugging Face folder. Raises: CheckpointError unless it can be read and holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again.")
    return content
