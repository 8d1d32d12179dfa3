# SPDX-License-Identifier: Apache-2.0
"""Processes that share work. They die with the process that started them, however it ends: an orphan that still writes
would disturb the same command when it is started again."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@contextmanager
def worker_processes(
    work: Callable[[Job], Result], *, num_workers: int
) -> Iterator[Callable[[Job], "Future[Result]"]]:
    """Give a function that starts `work` on a job: in this process with one worker, else in spawned processes."""
    if num_workers == 1:
        yield lambda job: _done_here(work, job)
        return
    pool = ProcessPoolExecutor(
        max_workers=num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )
    try:
        yield lambda job: pool.submit(work, job)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done_here(work: Callable[[Job], Result], job: Job) -> "Future[Result]":
    future: Future[Result] = Future()
    future.set_result(work(job))
    return future


def _end_with_parent() -> None:
    """Start a thread that ends this worker as soon as its parent is gone; end quietly on Ctrl-C."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    threading.Thread(target=watch, daemon=True, name="watch-parent").start()
