# SPDX-License-Identifier: Apache-2.0
"""Asking a run to stop: SIGUSR2, SIGTERM or Ctrl-C to any process (stop_signals.py), or a file RUN_DIR/STOP.

All only set a flag. The trainer shares the flags of all processes in the step's all-reduce, so that every rank stops
after the same step, saves, and exits 0. RUN_DIR/DONE says that the run is finished, never an exit code: one other than
0 would make srun --kill-on-bad-exit kill the ranks that still save."""

from pathlib import Path

from megatron_eve.run_files import STOP_FILE
from megatron_eve.stop_signals import StopSignals


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self, run_dir: Path, signals: StopSignals) -> None:
        self._stop_file = run_dir / STOP_FILE
        self._signals = signals

    def __call__(self) -> bool:
        return self._signals.asked or self._stop_file.exists()

    def may_save(self) -> None:
        """From here on a Ctrl-C stops the run after its step."""
        self._signals.may_save()
