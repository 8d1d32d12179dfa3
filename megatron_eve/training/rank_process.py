# SPDX-License-Identifier: Apache-2.0
"""The process of a rank as others see it: where it runs, and in what state it is (Linux only).

RUN_DIR/stacks/rank0001.txt    Python stacks of a rank: when a rank stops answering, at a fatal signal (NCCL's own
                               watchdog aborts), and at `kill -USR1 PID`
"""

import faulthandler
import json
import os
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

STACKS = "stacks"
DUMP_SIGNAL = signal.SIGUSR1
_LAST_WORDS_S = 3.0  # for a stopped process to write its stacks
_STATES = {"T": "stopped", "t": "stopped", "D": "waiting for a disk", "Z": "dead"}


@dataclass(frozen=True, kw_only=True, slots=True)
class RankProcess:
    """A process, told apart from a later one with the same number."""

    host: str
    machine: str  # boot and namespace of process numbers: where `pid` is valid
    pid: int
    born: str  # in clock ticks since the boot

    @classmethod
    def own(cls) -> "RankProcess":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            machine=f"{boot} {os.readlink('/proc/self/ns/pid')}",
            pid=pid,
            born=_stat(pid)[19],
        )

    @classmethod
    def from_text(cls, text: str) -> "RankProcess":
        return cls(**json.loads(text))

    def text(self) -> str:
        return json.dumps(asdict(self))

    def state(self, *, seen_from: "RankProcess") -> str:
        """One word; empty from another machine."""
        if self.machine != seen_from.machine:
            return ""
        fields = _stat(self.pid)
        if not fields or fields[19] != self.born:
            return "gone"
        return _STATES.get(fields[0], "running")

    def end(self, *, by: "RankProcess") -> None:
        """Let a process that does not answer write its stacks, then end it. Does nothing from another machine."""
        for number in (DUMP_SIGNAL, signal.SIGCONT):
            self._send(number, by=by)
        until = time.monotonic() + _LAST_WORDS_S
        while self._is_alive(by) and time.monotonic() < until:
            time.sleep(0.1)
        self._send(signal.SIGKILL, by=by)

    def _is_alive(self, other: "RankProcess") -> bool:
        return self.state(seen_from=other) not in ("", "gone", "dead")

    def _send(self, number: signal.Signals, *, by: "RankProcess") -> None:
        if self._is_alive(by):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


class StackFile:
    """RUN_DIR/stacks/rankNNNN.txt, kept open during the run, because opening it may fail when it is needed."""

    def __init__(self, run_dir: Path, *, rank: int) -> None:
        folder = run_dir / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank:04d}.txt"
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)
        if not self._was_enabled:
            faulthandler.enable(file=self._file, all_threads=True)

    def note(self, text: str) -> None:
        """A text of its own."""
        with suppress(OSError):
            self._file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._file.flush()

    def write(self, why: str) -> None:
        """This process's stacks, with a line above."""
        self.note(why)
        faulthandler.dump_traceback(file=self._file, all_threads=True)

    def close(self) -> None:
        """A run that ends well leaves no empty file."""
        faulthandler.unregister(DUMP_SIGNAL)
        if not self._was_enabled:
            faulthandler.disable()
        self._file.close()
        with suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()  # by the last one


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
