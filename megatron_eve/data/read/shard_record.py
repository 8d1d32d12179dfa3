# SPDX-License-Identifier: Apache-2.0
"""What the build of a shard folder recorded about itself (dataset.json), compared with a run's configuration.

Comes in: the shard folders of a run and the fields that both sides choose. Refused: a folder built with another
choice. Shards without dataset.json, or from a build that did not know a choice, were made with its default.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.errors import ConfigError, DataError

_FILE = "dataset.json"


def check_exif_rotation(folders: Sequence[Path], *, exif_rotation: bool) -> None:
    """Rows hold the sizes of pictures as they are trained on, turned or not. Raises ConfigError, DataError."""
    for folder in folders:
        built = built_exif_rotation(folder)
        if built is not exif_rotation:
            flag = "--exif-rotation" if exif_rotation else "--no-exif-rotation"
            raise ConfigError(
                f"data.exif_rotation={str(exif_rotation).lower()}, but {folder / _FILE} says that its shards were "
                f"built with {str(built).lower()}; set data.exif_rotation={str(built).lower()} or build the shards "
                f"again with {flag}."
            )


def built_exif_rotation(folder: Path) -> bool:
    """Whether a shard folder's pictures were measured turned. Raises DataError."""
    return _option(folder / _FILE, "exif_rotation", default=True)


def _option(path: Path, name: str, *, default: bool) -> bool:
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("options", {}).get(name, default)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}); copy it again or build the shards again."
        ) from error
    if not isinstance(value, bool):
        raise DataError(f"{path}: options.{name} is {value!r}, expected true or false.")
    return value
