# SPDX-License-Identifier: Apache-2.0
"""Notices a rank that no longer answers, names it, and ends the run so that its launcher starts it again.

A thread of every rank counts up a number in the store that the process group was made with, and looks at the next
rank's number. If that stands still for train.distributed_timeout_s, the rank's process is stopped, dead, or out of
reach: all ranks write their stacks to RUN_DIR/stacks (rank_process.py), the rank that noticed names the silent ones,
and all end with exit code 1. A busy rank still answers, since a thread counts. Collectives that wait for it have the
same limit of their own; their errors are explained here, too.

No collective is used. Time in which this process itself was stopped (Ctrl-Z) does not count."""

import json
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_eve.parallel.groups import ParallelState
from megatron_eve.training.rank_process import STACKS, RankProcess, StackFile

_LOG = logging.getLogger(__name__)
_BEAT_S = 2.0
_BEATS_A_LIMIT = 10  # at least
_FAREWELL_S = 5.0  # for all ranks to write their stacks
_SHOWN = 8
_LOST = re.compile(  # what collectives of gloo and NCCL say when another rank is not there
    r"timed out|timeout|connection (closed|reset|refused)|broken pipe|remote process|aborted",
    re.IGNORECASE,
)


class Watchdog:
    """The watchdog of one rank, from the making of the groups to the end of the loop."""

    def __init__(
        self, store: Store, *, rank: int, world_size: int, limit_s: float, run_dir: Path
    ) -> None:
        """`store`: a connection of its own, for another thread may wait in a shared one."""
        self._store, self._rank, self._size = store, rank, world_size
        self._limit_s, self._run_dir = limit_s, run_dir
        self._beat_s = min(_BEAT_S, limit_s / _BEATS_A_LIMIT)
        # Sooner than a collective of NCCL, which would abort the process before it could say why.
        self._silence_s = limit_s - 2 * self._beat_s
        self._own = RankProcess.own()
        self._place = "the start"
        self._ended = threading.Event()
        self._acting = threading.Lock()
        self._rounds = 0  # answers of the store
        self._earlier: list[int] = []  # all ranks' numbers, when one began to be late

    def __enter__(self) -> "Watchdog":
        self._stacks = StackFile(self._run_dir, rank=self._rank)
        self._store.set(f"process/{self._rank}", self._own.text())
        for work in (self._beat, self._watch_store):
            threading.Thread(target=work, daemon=True, name=f"watchdog{work.__name__}").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and is_lost_contact(error):
            self._explain(error)
        self.finish()

    def at(self, place: str) -> None:
        """Record what this rank is about to do, for the others to read."""
        self._place = place

    def finish(self) -> None:
        """This rank no longer needs the others, and they must not miss it."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._acting:
            try:
                self._store.add(f"ended/{self._rank}", 1)
            except RuntimeError as error:  # its process has ended, too
                _LOG.debug("the store is gone: %s", error)
            self._stacks.close()

    def _beat(self) -> None:
        """Count up, and look at the next rank and at what others found. Runs in a thread."""
        after, late, number = (self._rank + 1) % self._size, 0.0, -1
        while not self._ended.wait(self._beat_s):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                self._store.set(f"place/{self._rank}", self._place)
                if self._store.check(["verdict"]):
                    self._act(json.loads(self._store.get("verdict")))
                found = self._number("beat", after)
                has_ended = self._number("ended", after) > 0
            except RuntimeError as error:
                _LOG.debug("the store does not answer: %s", error)
                continue  # the other thread counts
            self._rounds += 1
            late = 0.0 if found != number or has_ended else late + self._beat_s
            number = found
            if late == 0:
                self._earlier = []
            elif late > self._silence_s / 2 and not self._earlier:
                self._earlier = self._beats()
            if late > self._silence_s:
                self._publish(self._silent(self._earlier, self._beats()), late=late)

    def _watch_store(self) -> None:
        """If the store itself does not answer, the rank or launcher that keeps it is silent. Runs in a thread."""
        silent, rounds = 0.0, -1
        while not self._ended.wait(self._beat_s):
            silent = 0.0 if self._rounds != rounds else silent + self._beat_s
            rounds = self._rounds
            if silent > self._limit_s:
                self._act(self._verdict_on_store(silent))

    def _explain(self, error: BaseException) -> None:
        """A collective failed: end here if silent ranks are known, or if another rank's error is the cause."""
        try:
            if self._store.check(["verdict"]):
                self._act(json.loads(self._store.get("verdict")))
            before = self._beats()
            time.sleep(3 * self._beat_s)
            silent = self._silent(before, self._beats())
            self._stacks.note("".join(traceback.format_exception(error)))
            self._publish(silent, late=3 * self._beat_s, otherwise=self._otherwise(error))
        except RuntimeError as lost:
            _LOG.debug("the store is gone as well: %s", lost)

    def _otherwise(self, error: BaseException) -> str:
        """Why a collective failed although all ranks answer, or ended well or with a message of their own."""
        first = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        ended = [str(r) for r in range(self._size) if self._number("ended", r)]
        if ended:
            return f"rank {', '.join(ended[:_SHOWN])} ended before the others and says why itself; {first}"
        return f"all ranks answer, but do not meet: {self._places()}; {first}"

    def _publish(self, silent: Sequence[int], *, late: float, otherwise: str = "") -> None:
        """Let all ranks end for one reason, the first that was found."""
        processes = {rank: self._process(rank) for rank in silent}
        told = [self._told(rank, processes[rank]) for rank in silent[:_SHOWN]]
        more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
        verb = "has" if len(silent) == 1 else "have"
        verdict = {
            "finder": self._rank,
            "text": f"{', '.join(told)}{more} {verb} not answered for {late:.0f} s"
            if silent
            else otherwise,
            "silent": {rank: process.text() for rank, process in processes.items() if process},
            "ends": {rank: self._neighbour(rank, silent) for rank in silent},
        }
        if not verdict["text"]:  # it answers again
            return
        first = self._store.compare_set("verdict", "", json.dumps(verdict))
        self._act(json.loads(first))

    def _act(self, verdict: Mapping[str, Any]) -> NoReturn:
        """Write the stacks, give the reason if this rank found it, end silent processes, and end."""
        with self._acting:  # one thread does; another one waits here for the end
            self._ended.set()
            self._stacks.write(f"rank {self._rank} at {self._place}: {verdict['text']}")
            if verdict["finder"] == self._rank:
                line = (
                    f"rank {self._rank}: ParallelError: {verdict['text']} (train.distributed_timeout_s="
                    f"{self._limit_s:g}); stacks of all ranks: {self._run_dir / STACKS}; to be started again\n"
                )
                os.write(2, line.encode())
            for rank, text in verdict["silent"].items():
                if verdict["ends"].get(rank) == self._rank:
                    RankProcess.from_text(text).end(by=self._own)
            self._wait_for_others(self._size - len(verdict["ends"]))
            os._exit(1)

    def _wait_for_others(self, number: int) -> None:
        """A launcher ends all ranks when the first has ended, so wait until they have written."""
        until = time.monotonic() + _FAREWELL_S
        waiting = threading.Thread(target=self._count_farewells, args=(number, until), daemon=True)
        waiting.start()
        waiting.join(_FAREWELL_S)  # the store itself may be silent

    def _count_farewells(self, number: int, until: float) -> None:
        try:
            self._store.add("written", 1)
            while self._number("written") < number and time.monotonic() < until:
                time.sleep(0.05)
        except RuntimeError as error:
            _LOG.debug("the store is gone: %s", error)

    def _verdict_on_store(self, silent: float) -> dict[str, Any]:
        """Only a rank that hears of no other can judge this; the first rank that can does."""
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        keeper = "the launcher" if by_launcher else "rank 0"
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return {
            "finder": 0 if by_launcher else 1,
            "text": f"{keeper}, which keeps the ranks' store at {where}, has not answered for {silent:.0f} s",
            "silent": {},
            "ends": {},
        }

    def _silent(self, before: Sequence[int], now: Sequence[int]) -> list[int]:
        """Ranks that have not counted in between and are not at their end."""
        return [
            rank
            for rank in range(self._size)
            if rank != self._rank and before[rank] == now[rank] and not self._number("ended", rank)
        ]

    def _neighbour(self, rank: int, silent: Sequence[int]) -> int | None:
        """The rank that may end a silent one's process: the first other rank on its machine."""
        process = self._process(rank)
        for other in range(self._size):
            answers = other not in silent and self._process(other)
            if answers and process and answers.machine == process.machine:
                return other
        return None

    def _told(self, rank: int, process: RankProcess | None) -> str:
        if process is None:
            return f"rank {rank}"
        state = process.state(seen_from=self._own)
        return f"rank {rank} on {process.host} (process {process.pid}{', ' * bool(state)}{state})"

    def _places(self) -> str:
        """Where the ranks are; those at the same place together."""
        found: dict[str, list[str]] = {}
        for rank in range(self._size):
            key = f"place/{rank}"
            place = self._store.get(key).decode() if self._store.check([key]) else "the start"
            found.setdefault(place, []).append(str(rank))
        return "; ".join(
            f"at {place}: {len(ranks)} ranks ({', '.join(ranks[:_SHOWN])})"
            for place, ranks in sorted(found.items(), key=lambda item: len(item[1]))
        )

    def _process(self, rank: int) -> RankProcess | None:
        key = f"process/{rank}"
        return (
            RankProcess.from_text(self._store.get(key).decode())
            if self._store.check([key])
            else None
        )

    def _beats(self) -> list[int]:
        return [self._number("beat", rank) for rank in range(self._size)]

    def _number(self, *names: object) -> int:
        return self._store.add("/".join(map(str, names)), 0)  # get() would wait for the key


class _Alone:
    """For a run of one process, which waits for no other."""

    def at(self, place: str) -> None: ...

    def finish(self) -> None: ...


Watch = Watchdog | _Alone


def watch_ranks(
    state: ParallelState, *, limit_s: float, run_dir: Path
) -> AbstractContextManager[Watch]:
    """The watchdog of this rank, during the run."""
    if state.world_size == 1:
        return nullcontext(_Alone())
    shared: Any = _get_default_store()
    store = PrefixStore("watchdog", shared.clone())
    return Watchdog(
        store, rank=state.rank, world_size=state.world_size, limit_s=limit_s, run_dir=run_dir
    )


def is_lost_contact(error: BaseException) -> bool:
    """Whether this is the error of a collective that another rank did not take part in."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return type(error) is RuntimeError and _LOST.search(str(error)) is not None
