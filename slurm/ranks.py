# SPDX-License-Identifier: Apache-2.0
"""The running `srun`: its messages, which show why ranks ended, and the signals that reach this process meanwhile.

srun's messages go to the batch log as they come and are kept for slurm/outcome.py. A signal (time limit, scancel,
preemption) makes the ranks save and stop; those that have not stopped after EVE_STOP_GRACE_S are killed.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from . import commands
from .commands import SlurmError
from .folder import RunFolder
from .job import Job

KEPT_LINES = 1000
"""Of srun's messages: the first ones show the cause, and 128 ranks give no more than that."""
KILL_PATIENCE_S = 30.0

log = logging.getLogger("slurm.launcher")


class Ranks:
    """The ranks of one start."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self._process: subprocess.Popen[str] | None = None
        self._asked_at: float | None = None
        self.killed = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def stopping(self) -> bool:
        """Whether the ranks were asked to stop."""
        return self._asked_at is not None

    @property
    def have_logs(self) -> bool:
        """Whether a rank of this start lived long enough to have a log."""
        folder = os.environ.get("RANK_LOGS")
        return folder is not None and any(Path(folder).glob("*.log"))

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """STOP file and signal: the file also reaches ranks that are still starting."""
        log.info("got %s: the ranks save and stop", signal.Signals(number).name)
        self._asked_at = self._asked_at or time.monotonic()
        self._folder.write_stop(self._job)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)

    def run(self, command: Sequence[str], *, env: Mapping[str, str]) -> tuple[int, str]:
        """Run to the end; the exit code and srun's messages. Does not start if a signal came before."""
        if self.stopping:
            return 0, ""
        self._process = subprocess.Popen(
            command, env=dict(env), stderr=subprocess.PIPE, text=True, errors="replace"
        )
        assert self._process.stderr is not None
        kept: list[str] = []
        reader = threading.Thread(target=_hand_on, args=(self._process.stderr, kept), daemon=True)
        reader.start()
        while True:
            try:
                code = self._process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                self._kill_hanging()
        reader.join(timeout=5)  # a child that lives on may hold the pipe
        return code, "".join(kept)

    def _kill_hanging(self) -> None:
        """Ranks that do not stop when asked (a collective that hangs) must not take the job to its time limit, where
        nothing is left to requeue it."""
        if self._asked_at is None or time.monotonic() - self._asked_at < self._job.stop_grace_s:
            return
        log.error(
            "the ranks did not stop within EVE_STOP_GRACE_S=%g: killing them",
            self._job.stop_grace_s,
        )
        self.killed = True
        try:  # steps only, not this script
            commands.ask("scancel", "--signal=KILL", self._job.job_id, limit_s=KILL_PATIENCE_S)
        except SlurmError as error:
            log.error("%s; ending srun instead", error)
            assert self._process is not None
            self._process.kill()
        self._asked_at = time.monotonic()

    def ignore_signals(self) -> None:
        """From here on only Slurm's SIGKILL ends this process."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _hand_on(source: IO[str], kept: list[str]) -> None:
    """Each line to this process's stderr, which is the batch log; Slurm's own also to `kept`."""
    for line in source:
        if line.startswith(("srun", "slurmstepd")) and len(kept) < KEPT_LINES:
            kept.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()
