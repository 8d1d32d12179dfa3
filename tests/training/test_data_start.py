# SPDX-License-Identifier: Apache-2.0
"""Data leaders open their data at their own pace; nobody waits in a collective, and only the first failure is told."""

import dataclasses
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from megatron_eve.errors import DataError, ElsewhereError, ParallelError
from megatron_eve.training import data_start
from megatron_eve.training.data_start import open_on_all
from megatron_eve.training.unreadable import UnreadableGuard


@dataclasses.dataclass
class Place:
    """What open_on_all() asks of a ParallelState: `world` processes, of which every second is a data leader."""

    rank: int
    world_size: int

    @property
    def dp_rank(self) -> int:
        return self.rank // 2

    @property
    def dp_size(self) -> int:
        return self.world_size // 2

    @property
    def is_data_leader(self) -> bool:
        return self.rank % 2 == 0


Opener = Callable[[int, Callable[[], None], Callable[[str], bool]], Any]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    store = HashStore()
    monkeypatch.setattr(data_start, "_get_default_store", lambda: store)
    monkeypatch.setattr(data_start, "_LOOK_S", 0.01)
    monkeypatch.setattr(data_start, "_LEAST_SILENCE_S", 0.3)
    return store


def start_all(opener: Opener, *, world_size: int = 4) -> list[Any]:
    """Each rank's result or error, as threads."""
    results: list[Any] = [None] * world_size

    def start(rank: int) -> None:
        place: Any = Place(rank, world_size)
        try:
            results[rank] = open_on_all(
                lambda *start: opener(rank, *start), state=place, timeout_s=0.1
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def loader(fingerprint: str = "plan") -> SimpleNamespace:
    return SimpleNamespace(fingerprint=fingerprint)


def test_all_wait_for_a_leader_that_counts_longer_than_the_limit(store: HashStore) -> None:
    finished: list[float] = []

    def opener(rank: int, alive: Callable[[], None], is_first: Any) -> Any:
        until = time.monotonic() + (1.0 if rank == 2 else 0.0)
        while time.monotonic() < until:
            alive()
            time.sleep(0.01)
        finished.append(time.monotonic())
        return loader()

    results = start_all(opener)
    assert [result is not None for result in results] == [True, False, True, False]
    assert all(isinstance(result, SimpleNamespace | None) for result in results)
    assert len(finished) == 2
    assert start_all(opener)[0] is not None, "a second start in the same world"


def test_one_failure_is_told_by_one_process(store: HashStore) -> None:
    def opener(rank: int, alive: Callable[[], None], is_first: Any) -> Any:
        raise DataError("18 samples are not counted yet")

    results = start_all(opener)
    told = [result for result in results if isinstance(result, DataError)]
    assert len(told) == 1
    assert sum(isinstance(result, ElsewhereError) for result in results) == 3


def test_a_failure_ends_those_who_still_count(store: HashStore) -> None:
    def opener(rank: int, alive: Callable[[], None], is_first: Any) -> Any:
        if rank == 2:
            raise DataError("damaged")
        while True:
            alive()
            time.sleep(0.01)

    results = start_all(opener)
    assert isinstance(results[2], DataError)
    assert all(isinstance(results[rank], ElsewhereError) for rank in (0, 1, 3))


def test_a_leader_without_a_sign_of_life_is_named(store: HashStore) -> None:
    def opener(rank: int, alive: Callable[[], None], is_first: Any) -> Any:
        if rank == 2:
            time.sleep(2.0)
        return loader()

    results = start_all(opener)
    told = [result for result in results if isinstance(result, ParallelError)]
    assert len(told) == 1
    assert "data rank 1 has given no sign of life" in str(told[0])


def test_leaders_with_other_plans_do_not_train_together(store: HashStore) -> None:
    results = start_all(lambda rank, *_: loader(f"plan {rank}"))
    assert any(
        isinstance(result, DataError) and "plans other packs" in str(result) for result in results
    )


def test_a_row_is_met_for_the_first_time_by_one_process(store: HashStore) -> None:
    for _ in range(2):  # each start anew
        met: list[tuple[str, bool]] = []

        def opener(rank: int, alive: Any, is_first: Callable[[str], bool]) -> Any:
            met.extend((name, is_first(name)) for name in ("a.mds:1", "a.mds:2", "a.mds:1"))  # noqa: B023
            return loader()

        start_all(opener)
        assert sorted(name for name, is_first in met if is_first) == ["a.mds:1", "a.mds:2"]


def test_a_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_start, "_get_default_store", None)
    place: Any = Place(0, 1)
    assert open_on_all(lambda *_: loader(), state=place, timeout_s=1) == loader()  # type: ignore[arg-type,return-value]


def test_too_many_unreadable_samples_end_every_process_at_the_same_step() -> None:
    told = UnreadableGuard(left=2, is_teller=True)
    other = UnreadableGuard(left=2, is_teller=False)
    for guard in (told, other):
        for unreadable in (1, 0, 1, 0):
            guard.count(unreadable)
    with pytest.raises(DataError, match=r"3 samples could not be read since .* leaves 2"):
        told.count(1)
    with pytest.raises(ElsewhereError):
        other.count(1)
