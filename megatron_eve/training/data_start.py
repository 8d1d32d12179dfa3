# SPDX-License-Identifier: Apache-2.0
"""The start of the data on all processes: data leaders open their loaders, which may count tokens for a while; the
other processes wait for all of them, and all plans are compared.

No process waits in a collective, which has a time limit. Leaders leave signs of life in the store that the process
group was made with, and every process looks at them there; so counting may take its time, and a dead or stuck leader
is noticed. The first leader that fails gives the reason; the other processes end silently. The same store later tells
a leader whether it is the first to meet an unreadable row.
"""

import time
from collections.abc import Callable

from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_eve.data.loader import IsFirst, PackLoader, first_time
from megatron_eve.data.plan.counting import Alive
from megatron_eve.errors import DataError, ElsewhereError, ParallelError
from megatron_eve.parallel.groups import ParallelState

_LOOK_S = 0.5
_LEAST_SILENCE_S = 60.0  # reading a large file of counts takes seconds
_LEADERS_A_LOOK = 16  # with more leaders each looks less often, because one process answers all


def open_on_all(
    open_loader: Callable[[Alive, IsFirst], PackLoader], *, state: ParallelState, timeout_s: float
) -> PackLoader | None:
    """This process's loader, if it is a data leader, once all leaders have theirs and have planned the same packs.
    Every process calls it. `timeout_s`: how long a leader may give no sign of life.

    Raises: on the first process that fails, what `open_loader` raises, ParallelError if a leader is silent, DataError
    if two leaders have different plans; ElsewhereError on the others."""
    if state.world_size == 1:
        return open_loader(lambda: None, first_time())
    board = Board(_get_default_store(), state=state, silence_s=max(timeout_s, _LEAST_SILENCE_S))
    loader = None
    try:
        if state.is_data_leader:
            loader = open_loader(board.alive, board.is_first)
            board.tell_plan(loader.fingerprint)
        board.wait_for_all()
    except ElsewhereError:
        raise
    except Exception as error:
        if board.is_first_to_fail():
            raise
        raise ElsewhereError("another process has failed before this one") from error
    return loader


class Board:
    """What the processes of one start write into the store. Leaders go by their data rank."""

    def __init__(self, store: Store, *, state: ParallelState, silence_s: float) -> None:
        number = store.add(f"data_start/calls/{state.rank}", 1)  # the same on every process
        self._store, self._prefix = store, f"data_start/{number}"
        self._rank, self._size = state.dp_rank, state.dp_size
        self._silence_s = silence_s
        self._look_s = _LOOK_S * max(1.0, state.dp_size / _LEADERS_A_LOOK)
        self._last_look = -self._look_s
        self._beats = dict.fromkeys(range(self._size), (-1, time.monotonic()))

    def alive(self) -> None:
        """Give a sign of life, and look at the others. Raises: ElsewhereError if one failed, ParallelError."""
        if time.monotonic() - self._last_look >= self._look_s:
            self._store.add(self._key("beat", self._rank), 1)
            self._look()

    def is_first(self, name: str) -> bool:
        """Whether no process has asked this about a name before, in this start."""
        try:
            return self._store.add(self._key("met", name), 1) == 1
        except RuntimeError:  # rank 0, which answers, is gone, and this run with it
            return True

    def tell_plan(self, fingerprint: str) -> None:
        """This leader has its loader."""
        self._store.set(self._key("plan", self._rank), fingerprint)
        self._store.add(self._key("ready", self._rank), 1)
        self._store.add(self._key("ready"), 1)

    def is_first_to_fail(self) -> bool:
        """Whether this process, which has failed, is the first one; then it gives the reason."""
        try:
            return self._store.add(self._key("failed"), 1) == 1
        except RuntimeError:  # rank 0, which answers, is gone
            return True

    def wait_for_all(self) -> None:
        """Wait until every leader has its loader.

        Raises: as alive(); DataError if this leader's plan differs from that of data rank 0."""
        while self._number("ready") < self._size:
            self._look()
            time.sleep(self._look_s)
        mine = self._store.get(self._key("plan", self._rank)).decode()
        first = self._store.get(self._key("plan", 0)).decode()
        if mine != first:
            raise DataError(
                f"data rank {self._rank} plans other packs ({mine}) than data rank 0 ({first}): under the same "
                "paths they read other shards, or other counts of their tokens. Put the shards on a file system that "
                "all nodes share, or count them once and copy lengths-*.npz with them to every node."
            )

    def _look(self) -> None:
        self._last_look = now = time.monotonic()
        if self._number("failed"):
            raise ElsewhereError("another process cannot start its data, and says why")
        for rank, (beat, since) in self._beats.items():
            found = self._number("beat", rank)
            if found != beat:
                self._beats[rank] = (found, now)
            elif now - since > self._silence_s and not self._number("ready", rank):
                raise ParallelError(
                    f"data rank {rank} has given no sign of life for {self._silence_s:.0f} s while it opened its data; "
                    "look at its node and at the file system of the shards"
                )

    def _number(self, *names: object) -> int:
        try:
            return self._store.add(
                self._key(*names), 0
            )  # does not wait for the key, as get() would
        except RuntimeError as error:
            raise ParallelError(
                f"rank 0 cannot be asked any more while the data are opened ({error}); its own last line says why"
            ) from error

    def _key(self, *names: object) -> str:
        return "/".join(map(str, (self._prefix, *names)))
