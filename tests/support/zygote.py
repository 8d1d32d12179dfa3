# SPDX-License-Identifier: Apache-2.0
"""Starts trainers in a fraction of a second: one process imports everything and forks a trainer for every run.

A trainer started this way is `megatron_eve.train.main` in a fresh process with no threads, groups or random state of
another run. What is saved is the import of torch and megatron-core, about five seconds."""

import contextlib
import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.gloo import forked_from_imports

TIMEOUT_S, STACKS_S = 120, 3
KILLER = "killer"
"""Name of threads that a trainer which has come to its end waits for."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A run of the training command. `before`, called with the rank in each trainer first, must be importable."""

    argv: Sequence[str]
    processes: int
    port: int
    log: Path
    before: Callable[[int], None] | None = None


def _serve(pipe: Connection) -> None:
    import nvidia.dali
    import torch
    import torch._inductor  # deterministic algorithms import it

    import megatron_eve.training.run  # noqa: F401

    torch.set_num_threads(1)
    assert nvidia.dali is not None
    gc.freeze()  # else each trainer sorts all of it out as it ends
    while (start := pipe.recv()) is not None:
        pipe.send(_run(start))


def _run(start: Start) -> list[int]:
    """Exit codes of the ranks, negative for a signal. When one dies, the others are killed, as a launcher does."""
    running = {_fork(start, rank): rank for rank in range(start.processes)}
    groups, codes = list(running), [0] * start.processes
    deadline = time.monotonic() + TIMEOUT_S
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:
                _kill(list(running))
        elif time.monotonic() > deadline:
            _signal(groups, signal.SIGQUIT)  # they print where they are
            time.sleep(STACKS_S)
            _kill(groups)
            return [-99] * start.processes
        else:
            time.sleep(0.005)
    return codes


def _kill(groups: Sequence[int]) -> None:
    _signal(groups, signal.SIGKILL)


def _signal(groups: Sequence[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _fork(start: Start, rank: int) -> int:
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # both sides do it, whoever comes first
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        code = _trainer(start, rank)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _trainer(start: Start, rank: int) -> int:
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGQUIT, file=2)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if start.processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(start.processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(start.port),
        )
    from megatron_eve.train import main

    if start.before is not None:
        start.before(rank)
    code = main(list(start.argv))
    for thread in threading.enumerate():
        if thread.name == KILLER:
            thread.join()
    return code


class Zygote:
    """Owns the process that forks."""

    def __init__(self) -> None:
        context = forked_from_imports()
        self._pipe, theirs = context.Pipe()
        self._process: Any = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def run(self, start: Start) -> list[int]:
        """Exit codes of the ranks; returns when all have ended."""
        self._pipe.send(start)
        assert self._pipe.poll(TIMEOUT_S + 30), "the process that forks trainers does not answer"
        codes: list[int] = self._pipe.recv()
        return codes

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
