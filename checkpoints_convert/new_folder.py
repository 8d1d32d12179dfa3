# SPDX-License-Identifier: Apache-2.0
"""A folder that gets its name when it is whole.

It is written under another name beside its place. If anything goes wrong on the way (a full disk, no permission, a
checkpoint that turns out to be damaged, Ctrl-C), what was written is removed again, and a folder that it was to replace
is as it was."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_eve.checkpoint.manifest import sync_path
from megatron_eve.errors import CheckpointError


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write to in the block. At its end what is in it is brought to the disk and it is renamed to
    `folder`; an older one goes last.

    Raises: CheckpointError if `folder` exists and not `overwrite`, if it is a file, or with what the file system
    refused."""
    folder = folder.resolve()  # of a link, what it points to is replaced, and written beside
    refuse_taken(folder, overwrite=overwrite)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync_path(path)
        _publish(partial, folder)
    except (OSError, RuntimeError) as error:
        refusal = _of_the_file_system(error)
        if refusal is None:
            raise
        raise CheckpointError(_told(refusal, folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_taken(folder: Path, *, overwrite: bool) -> None:
    """Raises: CheckpointError if `folder` exists and not `overwrite`, or if it is a file."""
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another name or pass --overwrite.")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose another name.")


def _publish(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise
    with suppress(OSError):  # it is there; at worst a power cut in this moment takes the name back
        sync_path(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _of_the_file_system(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save hides a full disk behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _told(error: OSError, folder: Path) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{folder} is not written: {reason}{where}. Nothing of it was left behind."
