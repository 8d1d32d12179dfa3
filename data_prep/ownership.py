# SPDX-License-Identifier: Apache-2.0
"""Who may write to a shard folder: one build at a time, and only the build that began it.

dataset.json is written when a build begins and names its input and options; a folder without it must be empty. A lock
keeps a second process out.
"""

import json
import os
import re
import shutil
from pathlib import Path

from megatron_eve.errors import ConfigError, DataError
from megatron_eve.folder_lock import LOCK_FILE
from megatron_eve.whole import TEMPORARY_PREFIX, temporary_name, write_json

INDEX_FILE, QUARANTINE_FILE = "index.json", "quarantine.jsonl"
DATASET_FILE = "dataset.json"
Identity = dict[str, object]
_OURS = re.compile(
    rf"{INDEX_FILE}|{DATASET_FILE}|{QUARANTINE_FILE}|{re.escape(LOCK_FILE)}|part-\d+|(lengths|counts)\b.*|"
    rf"{re.escape(TEMPORARY_PREFIX)}.*"
)
"""Names in a shard folder that a build, or the trainer's cached counts, gave."""


def claim(out: Path, *, identity: Identity, overwrite: bool) -> None:
    """Make sure that `out` is empty or belongs to this very build, and clear what a killed run left half done.

    Raises: ConfigError if the folder holds something else, or belongs to another build and `overwrite` is false."""
    refuse_foreign(out)
    found = _read_identity(out, fields=tuple(identity))
    if found is not None and overwrite:
        _clear(out)
    elif found is not None and found != identity:
        raise ConfigError(
            f"{out} was built from something else: {_difference(found, identity)}; use the same "
            "input and options, another folder, or --overwrite."
        )
    for leftover in out.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not (out / DATASET_FILE).exists():
        write_json(out / DATASET_FILE, {**identity, "complete": False})


def is_whole(out: Path, *, identity: Identity) -> bool:
    """Whether `out` holds a finished build, of any input.

    Raises: ConfigError if it also holds foreign files, which would be deleted with it."""
    if _read_identity(out, fields=tuple(identity)) is None or not (out / INDEX_FILE).exists():
        return False
    foreign = [name for name in sorted(os.listdir(out)) if not _OURS.fullmatch(name)]
    if foreign:
        raise ConfigError(
            f"{out} also holds {', '.join(foreign[:3])}, which --overwrite would delete; move that away or choose "
            "another folder."
        )
    return True


def staging_folder(out: Path, *, identity: Identity) -> Path:
    """Where to make a build that is to replace the finished one in `out`: beside it, with the parts of an earlier start
    of the same build, and of no other."""
    staging = temporary_name(out.resolve())
    staging.mkdir(exist_ok=True)
    found = _read_identity(staging, fields=tuple(identity))
    claim(staging, identity=identity, overwrite=found is not None and found != identity)
    return staging


def refuse_foreign(out: Path) -> None:
    """Raises: ConfigError if `out` is a file, or a folder that no build began but holds something."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give an empty or new folder.")
    if not out.is_dir() or (out / DATASET_FILE).exists():
        return
    foreign = sorted(set(os.listdir(out)) - {LOCK_FILE, f"{TEMPORARY_PREFIX}{DATASET_FILE}"})
    if foreign:
        raise ConfigError(
            f"{out} is not a shard folder but holds {foreign[:3]}; give an empty or new folder."
        )


def refuse_unfinished(folder: Path) -> None:
    """Raises: DataError if no finished build is there."""
    if not (folder / INDEX_FILE).is_file():
        raise DataError(
            f"{folder} has no {INDEX_FILE}: it is no shard folder, or its build is not complete; "
            "run build-shards (again)."
        )


def _clear(out: Path) -> None:
    """Remove a shard folder's content: the index first, so that the rest never looks complete; dataset.json last, so
    that a killed clearing can go on."""
    for name in (INDEX_FILE, QUARANTINE_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in out.glob("part-*"):
        shutil.rmtree(folder)
    (out / DATASET_FILE).unlink()


def _read_identity(out: Path, *, fields: tuple[str, ...]) -> Identity | None:
    """The identity of the build that owns the folder; None if it has no owner."""
    path = out / DATASET_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: content[key] for key in fields}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); choose another folder."
        ) from error


def _difference(found: Identity, expected: Identity) -> str:
    """The first field in which two identities differ."""
    for key, value in expected.items():
        other = found[key]
        if isinstance(value, dict) and isinstance(other, dict):
            for inner in sorted({*value, *other}):
                if other.get(inner) != value.get(inner):
                    return f"{key}.{inner} is {other.get(inner)!r} there, {value.get(inner)!r} now"
        elif other != value:
            return f"{key} is {other!r} there, {value!r} now"
    raise AssertionError("the identities are equal")
