# SPDX-License-Identifier: Apache-2.0
"""The folder that a command of data_prep writes, whole or absent (megatron_eve/whole.py), and what it refuses to
replace."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.errors import ConfigError
from megatron_eve.whole import mend, whole_folder


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if `out` is a file or a folder with something in it and `overwrite` is false."""
    mend(out.resolve())
    if overwrite:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"{out} exists already; choose another place or pass --overwrite to replace it."
        )


def _refuse_foreign_files(final: Path, *, new: Path) -> None:
    """Replacing a folder must not delete files other than results of the same kind."""
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
    with whole_folder(final) as temporary:
        yield temporary
        _refuse_foreign_files(final, new=temporary)
