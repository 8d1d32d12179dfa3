# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or absent: every result is written this way.

A result gets its name last. It lies beside its place under a temporary name until its bytes, and for a folder the
bytes and names of everything in it, are on the disk; then it is renamed, and the rename is brought to the disk, too.
If anything goes wrong (a full disk, no permission, Ctrl-C, an error of the caller), the temporary is removed and the
old file or folder stays.

A file system replaces a file by one rename, but not a folder that has something in it. So the old folder steps aside
first (`.replaced-NAME`) and goes when the new one has its name; if the new one cannot get it, the old one comes back.
A process that is killed between the two renames leaves the old folder aside, and the next one that wants the name
puts it back: see `mend`.

Needs no torch. Raises the file system's OSError, with the name of the file."""

import errno
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY_PREFIX = ".tmp-"
ASIDE_PREFIX = ".replaced-"
_SYNC_THREADS = 16


@contextmanager
def whole_file(path: Path, mode: str = "w", *, shared: bool = False) -> Iterator[IO[Any]]:
    """A file to write to in the block (`mode` "w": UTF-8 text, or "wb"); at the block's end it replaces `path`.

    `shared`: several processes may write `path` at once, each a whole one; the last one stays."""
    temporary = temporary_name(path, shared=shared)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_name(path)


def write_text(path: Path, text: str) -> None:
    """Replace a text file; after a crash it holds the old or the new text."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: object, *, indent: int | None = 1) -> None:
    """Replace a file by `value` as JSON with a final newline."""
    with whole_file(path) as file:
        json.dump(value, file, indent=indent, ensure_ascii=False)
        file.write("\n")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill in the block; at the block's end it replaces `folder`, whatever that holds. The caller
    must check beforehand whether it may be replaced."""
    folder = folder.resolve()  # of a link, what it points to is replaced, and written beside
    folder.parent.mkdir(parents=True, exist_ok=True)
    mend(folder)
    temporary = temporary_name(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        publish_folder(temporary, final=folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, *, final: Path) -> None:
    """Bring `temporary` to the disk, then replace_folder()."""
    sync_folder(temporary)
    replace_folder(temporary, final=final)


def replace_folder(temporary: Path, *, final: Path) -> None:
    """Give a folder whose bytes are on the disk the name `final`; a folder of that name goes when that is done."""
    aside = _aside_name(final)
    shutil.rmtree(aside, ignore_errors=True)
    is_replaced = final.exists()
    if is_replaced:
        os.rename(final, aside)
    try:
        os.rename(temporary, final)
    except BaseException as error:
        if is_replaced:
            _put_back(aside, final, error)
        raise
    _sync_name(final)
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, final: Path, error: BaseException) -> None:
    try:
        os.rename(aside, final)
    except OSError as second:
        raise OSError(
            second.errno, f"{second.strerror}; what it held before lies in {aside}", str(final)
        ) from error


def mend(folder: Path) -> None:
    """Put back a folder that a killed process had moved aside, if nothing else has its name."""
    aside = _aside_name(folder)
    if aside.is_dir() and not folder.exists():
        os.rename(aside, folder)


def mend_all(parent: Path) -> None:
    """mend() every folder in `parent`."""
    for aside in parent.glob(f"{ASIDE_PREFIX}*"):
        mend(parent / aside.name.removeprefix(ASIDE_PREFIX))


def temporary_name(path: Path, *, shared: bool = False) -> Path:
    """Where the next content of `path` is written; a `shared` one belongs to this process alone."""
    owner = f".{os.uname().nodename}.{os.getpid()}" if shared else ""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}{owner}")


def _aside_name(path: Path) -> Path:
    return path.with_name(f"{ASIDE_PREFIX}{path.name}")


def sync_path(path: str | Path) -> None:
    """Flush a file's bytes, or the names in a folder where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno == errno.EINVAL and os.path.isdir(path):  # some network file systems
            return
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves; many at a time, which journals combine."""
    paths = [
        os.path.join(parent, name) for parent, _, files in os.walk(folder) for name in [*files, "."]
    ]
    with ThreadPoolExecutor(max_workers=_SYNC_THREADS) as pool:
        deque(pool.map(sync_path, paths), maxlen=0)


def _sync_name(path: Path) -> None:
    with suppress(OSError):  # it is there; at worst a power cut in this moment takes the name back
        sync_path(path.parent)
