# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a folder: a lock on FOLDER/.lock, which dies with the process, however that ends.

The file names the process that holds it, for the error of the second one."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from megatron_eve.errors import InUseError

LOCK_FILE = ".lock"
_LOG = logging.getLogger(__name__)
_LOOK_S = 0.2


@contextmanager
def only_one(folder: Path, *, what: str, patience_s: float = 0.0) -> Iterator[FileIO]:
    """Hold the lock of a folder that exists; gives the locked file, which child processes may inherit.

    `what`: "run", "build", ... `patience_s`: how long to wait for a process that is about to end.
    Raises: InUseError naming the process that has it."""
    with (folder / LOCK_FILE).open("ab+", buffering=0) as file:
        if _acquire(file, folder=folder, what=what, patience_s=patience_s):
            with suppress(OSError):  # it can be held on a full disk, too
                file.truncate(0)
                file.write(f"{_this_process()}\n".encode())
        yield file


def _acquire(file: FileIO, *, folder: Path, what: str, patience_s: float) -> bool:
    """Whether the lock is held; False on a file system without locks. Raises: see only_one()."""
    until = time.monotonic() + patience_s
    is_told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:  # EACCES on some network file systems
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown process"
            if time.monotonic() > until:
                raise InUseError(
                    f"{folder} is in use by another {what}: {holder}; wait for it, end it, or choose another folder"
                ) from error
            if not is_told:
                _LOG.warning(
                    "waiting %.0f s for another %s in %s: %s", patience_s, what, folder, holder
                )
                is_told = True
            time.sleep(_LOOK_S)
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): start only one %s there", folder, error, what)
            return False


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    where = f"process {os.getpid()} on {socket.gethostname()}" + (
        f", Slurm job {job}" if job else ""
    )
    return f"{where}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
