# SPDX-License-Identifier: Apache-2.0
"""Real multi-process gloo runs inside a test.

Importing torch and megatron-core costs seconds, so all workers are forked from one process that has done it, and a pool
of them is started once per size. Each task gets a new process group and sets up the layout it needs. A failure on any
rank is raised in the test with that rank's traceback, and a task that hangs is killed."""

import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

IMPORTED = ["torch", "torch._inductor", "megatron_eve.training.run"]
TASK_TIMEOUT_S = 120
MANY_THREADS = 400


class WorkerError(AssertionError):
    """A task failed on a rank, or the pool hung."""


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch
    from torch.distributed import PrefixStore, TCPStore

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)  # where a task hangs goes to stderr, which pytest shows
    timeout = datetime.timedelta(seconds=TASK_TIMEOUT_S)
    store = TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=timeout)
    threads = 0
    for number in itertools.count():
        task = pipe.recv()
        if task is None:
            break
        # A process group of its own for each task: every group keeps threads, and a layout has twenty groups.
        torch.distributed.init_process_group(
            "gloo",
            store=PrefixStore(str(number), store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
        pipe.send(_answer(*task))
        _leave_groups()
        if _num_threads() > threads + MANY_THREADS:
            _free_models()
            threads = _num_threads()


def _answer(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
    try:
        return True, function(*args, **kwargs)
    except BaseException:
        return False, traceback.format_exc()


def _leave_groups() -> None:
    import torch

    from megatron_eve import device

    device.install()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _free_models() -> None:
    """Let go of the groups that dead models hold: each has a thread that wakes a hundred times a second.

    With a distributed optimizer in fp32 no collection frees them by itself: its shards are views of the weights, so
    their autograd graph holds the hooks of DistributedDataParallel, which hold everything, where Python cannot see."""
    from megatron.core.distributed import DistributedDataParallel

    for one in gc.get_objects():
        if type(one) is DistributedDataParallel:
            vars(one).clear()
    gc.collect()


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def forked_from_imports() -> Any:
    """Starts processes by fork from one that has imported what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class GlooPool:
    """`world_size` processes in one gloo process group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank; the results in the order of ranks.

        `function` must be importable by name. Raises: WorkerError with the traceback of every rank that failed."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args, kwargs))
        results, failures = [], []
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(TASK_TIMEOUT_S if not failures else 5):
                failures.append(f"rank {rank}: no answer from {function.__name__}")
                os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
                time.sleep(1)
                continue
            try:
                ok, value = pipe.recv()
            except EOFError:
                ok, value = False, "process died"
            results.append(value)
            if not ok:
                failures.append(f"rank {rank}:\n{value}")
        if failures:
            self.close(kill=True)  # the other ranks may hang in a collective
            raise WorkerError("\n".join(failures))
        return results

    def _context(self) -> Any:
        return forked_from_imports()

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = self._context()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, theirs), daemon=False
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self, *, kill: bool = False) -> None:
        """End the workers; the next run() starts new ones."""
        for process, pipe in self._workers:
            if not kill:
                pipe.send(None)
            else:
                process.kill()
        for process, pipe in self._workers:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
            pipe.close()
        self._workers = []
