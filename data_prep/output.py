# SPDX-License-Identifier: Apache-2.0
"""Writing results so that they are whole or absent: a folder or file is written under a temporary name next to its
place, synced to disk, and renamed. Refuses to replace anything unless the caller asked for it."""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.errors import ConfigError

TEMPORARY_PREFIX = ".tmp-"
SYNC_THREADS = 16


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if `out` is a file or a folder with something in it and `overwrite` is false."""
    if overwrite:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"{out} exists already; choose another place or pass --overwrite to replace it."
        )


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to disk; many at a time, which journals combine."""
    paths = [
        os.path.join(parent, name) for parent, _, files in os.walk(folder) for name in [*files, "."]
    ]
    with ThreadPoolExecutor(max_workers=SYNC_THREADS) as pool:
        deque(pool.map(_sync, paths), maxlen=0)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(temporary: Path, *, final: Path) -> None:
    """Sync `temporary` and rename it to `final`, replacing what is there."""
    sync_folder(temporary)
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync(final.parent)


def _refuse_foreign_files(final: Path, *, new: Path) -> None:
    """Replacing a folder must not delete what it holds beside results of the same kind."""
    if final.is_dir():
        foreign = sorted(set(os.listdir(final)) - set(os.listdir(new)))
        if foreign:
            raise ConfigError(
                f"{final} also holds {', '.join(foreign[:3])}, which --overwrite would delete; "
                "move that away or choose another folder."
            )


@contextmanager
def new_folder(final: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes `final` when the block ends, and vanishes when the block raises.

    Raises: ConfigError if `final` exists and `overwrite` is false, or if it holds files that the new one lacks.
    """
    refuse_existing(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMPORARY_PREFIX}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _refuse_foreign_files(final, new=temporary)
        publish_folder(temporary, final=final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Write `value` as JSON with a final newline; the file appears whole or not at all."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
