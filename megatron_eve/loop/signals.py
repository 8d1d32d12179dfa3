# SPDX-License-Identifier: Apache-2.0
"""Asking a run to stop: SIGUSR2 or SIGTERM to any process, or a file RUN_DIR/STOP.

A handler only sets a flag. The trainer shares the flags of all processes in the step's all-reduce, so that every rank
stops after the same step, saves, and exits 0. Whether the run is finished is told by RUN_DIR/DONE, never by an exit
code: a non-zero one would make srun --kill-on-bad-exit kill the ranks that still save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE, DONE_FILE = "STOP", "DONE"


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self, run_dir: Path) -> None:
        self._stop_file = run_dir / STOP_FILE
        self._signalled = False

    def __call__(self) -> bool:
        return self._signalled or self._stop_file.exists()

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


@contextmanager
def stop_on_signal(run_dir: Path) -> Iterator[StopFlag]:
    """Catch the stop signals for the duration of a run."""
    flag = StopFlag(run_dir)
    previous = {
        number: signal.signal(number, flag._set) for number in (signal.SIGUSR2, signal.SIGTERM)
    }
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
