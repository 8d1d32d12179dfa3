# SPDX-License-Identifier: Apache-2.0
"""The folder that a conversion writes, whole or absent (megatron_eve/whole.py), and what it refuses to replace."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.whole import mend, whole_folder


@contextmanager
def new_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to write to in the block; at its end it replaces `folder`.

    Raises: ConfigError if `folder` exists and not `overwrite` or is a file, CheckpointError with the system's error;
    then `folder` is as it was."""
    refuse_taken(folder, overwrite=overwrite)
    try:
        with whole_folder(folder) as temporary:
            yield temporary
    except (OSError, RuntimeError) as error:
        refusal = _of_the_file_system(error)
        if refusal is None:
            raise
        raise CheckpointError(_told(refusal, folder)) from error


def refuse_taken(folder: Path, *, overwrite: bool) -> None:
    """Raises: ConfigError if `folder` exists and not `overwrite`, or if it is a file."""
    mend(folder.resolve())
    if folder.exists() and not overwrite:
        raise ConfigError(f"{folder} exists; choose another name or pass --overwrite.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another name.")


def _of_the_file_system(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch.save hides a full disk behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _told(error: OSError, folder: Path) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{folder} is not written: {reason}{where}. Nothing of it was left behind."
