# SPDX-License-Identifier: Apache-2.0
"""A command as a child process, for the demo and short profiles: output goes to the console and to a log as it comes.

A child never outlives its parent. Asked to stop (Ctrl-C, SIGTERM), the parent passes the request on in the way that the
child understands and waits for it, so that a training run saves first; a second request kills. If the parent itself is
killed, the kernel sends the child its stop signal.
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from megatron_eve.errors import EveError

STOP_TIMEOUT_S = 90.0
LAST_LINES = 15
_READ_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"^(rank \d+: )?([\w.]*(Error|Exception)|error): ")
_LAUNCHER_NOISE = re.compile(r"^[EWI]\d{4} .*torch/distributed/elastic")


class CommandFailed(EveError):
    """A child ended with an error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A call of this Python interpreter."""

    arguments: tuple[str, ...]  # behind the interpreter
    log: Path
    env: tuple[tuple[str, str], ...] = ()
    stop_signal: signal.Signals = signal.SIGINT

    @property
    def text(self) -> str:
        """The same as a line for a shell."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.env]
        return " ".join([*variables, "python", shlex.join(self.arguments)])


def run_command(command: Command, *, held: IO[Any] | None = None) -> None:
    """Run to the end. `held`: a file whose lock the child keeps as long as it lives.

    Raises: CommandFailed with the last lines of output; KeyboardInterrupt after the child has stopped.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        start = log.tell()
        child = subprocess.Popen(
            [sys.executable, *command.arguments],
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(command.env)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which passes it on
            pass_fds=(held.fileno(),) if held else (),
            preexec_fn=_signal_when_parent_dies(command.stop_signal),
        )
        try:
            _pass_on(child, log)
        except BaseException:
            _stop(child, log, number=command.stop_signal)
            raise
    if child.returncode:
        raise CommandFailed(_failure(command, code=child.returncode, start=start))


def output_lines(log: Path, *, start: int) -> list[str]:
    """What a program wrote behind byte `start`, without progress bars' repetitions, empty lines and what torchrun adds
    when a worker has failed."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    lines = [line.split("\r")[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    lines = [line for line in lines if line]
    noise = next((n for n, line in enumerate(lines) if _LAUNCHER_NOISE.match(line)), len(lines))
    return lines[: noise + 1]


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM acts as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _pass_on(child: "subprocess.Popen[bytes]", log: IO[bytes]) -> None:
    """Copy output until the child has ended."""
    assert child.stdout is not None
    while chunk := os.read(child.stdout.fileno(), _READ_BYTES):
        log.write(chunk)
        log.flush()
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()
    child.wait()


def _stop(child: "subprocess.Popen[bytes]", log: IO[bytes], *, number: signal.Signals) -> None:
    killer = threading.Timer(STOP_TIMEOUT_S, _kill_family, args=(child.pid,))
    killer.start()
    try:
        _ask_to_stop(child.pid, number=number)
        _pass_on(child, log)
    except BaseException:
        _kill_family(child.pid)
        child.wait()
        raise
    finally:
        killer.cancel()


def _ask_to_stop(pid: int, *, number: signal.Signals) -> None:
    """Ask a launcher's workers themselves: they save and end well, and then so does the launcher."""
    try:
        child = psutil.Process(pid)
        workers = child.children() if number == signal.SIGTERM else []
        for process in workers or [child]:
            process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it has just ended


def _kill_family(pid: int) -> None:
    """Kill a process and all that it started."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _signal_when_parent_dies(number: signal.Signals) -> Callable[[], object]:
    libc = ctypes.CDLL(None, use_errno=True)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, int(number))


def _failure(command: Command, *, code: int, start: int) -> str:
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    lines = output_lines(command.log, start=start)
    errors = [line for line in lines if _ERROR.match(line)]
    first = f"\n  first error: {errors[0]}" if errors else ""
    last = "".join(f"\n    {line}" for line in lines[-LAST_LINES:])
    return f"{how} of: {command.text}{first}\n  log: {command.log}, which ends with:{last}"
