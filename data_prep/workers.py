# SPDX-License-Identifier: Apache-2.0
"""Processes that build parts. They die with the process that started them, however it ends: an orphan that goes on
writing would disturb the build that is started again."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from data_prep.parts import Counts, PartJob, build_part

Submit = Callable[[PartJob], "Future[Counts]"]


@contextmanager
def part_builders(*, num_workers: int) -> Iterator[Submit]:
    """Give a function that starts a PartJob: in this process with one worker, else in spawned processes."""
    if num_workers == 1:
        yield _build_here
        return
    pool = ProcessPoolExecutor(
        max_workers=num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )
    try:
        yield lambda job: pool.submit(build_part, job)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _build_here(job: PartJob) -> "Future[Counts]":
    future: Future[Counts] = Future()
    future.set_result(build_part(job))
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
