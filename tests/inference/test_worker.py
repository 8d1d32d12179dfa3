# SPDX-License-Identifier: Apache-2.0
"""The worker's thread: answers as the engine's, a bounded queue, places that are given back."""

import queue
import threading
from collections.abc import Callable, Iterator

import pytest

from megatron_eve.inference.cache import KeyValueCache
from megatron_eve.inference.engine import Engine, Flight, Request, Update
from megatron_eve.inference.sampling import SamplingOptions
from megatron_eve.inference.worker import BusyError, Worker
from tests.inference.questions import prompts

TIMEOUT_S = 60
Inbox = queue.SimpleQueue[Update | Exception]


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    worker = Worker(engine, rows=2, tokens=240, max_waiting=1)
    worker.start()
    yield worker
    worker.stop()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The model makes a step for each release of it."""
    semaphore, step = threading.Semaphore(0), Flight.step

    def gated(self: Flight) -> list[Update]:
        assert semaphore.acquire(timeout=TIMEOUT_S)
        return step(self)

    monkeypatch.setattr(Flight, "step", gated)
    yield semaphore
    semaphore.release(10_000)


def some_requests(engine: Engine, *, tokens: int = 5) -> list[Request]:
    return [Request(p, SamplingOptions(max_new_tokens=tokens)) for p in prompts(engine)]


def text_of(inbox: Inbox) -> str:
    """Wait for the whole answer."""
    text = ""
    while True:
        update = inbox.get(timeout=TIMEOUT_S)
        assert isinstance(update, Update), update
        text += update.text
        if update.answer is not None:
            assert text == update.answer.text
            return text


def wait_until(is_so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(TIMEOUT_S * 100):
        if is_so():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come about")


def test_answers_are_the_engines(engine: Engine, worker: Worker) -> None:
    asked = some_requests(engine)
    inboxes: list[Inbox] = [queue.SimpleQueue() for _ in range(3)]
    for request, inbox in zip(asked, inboxes, strict=False):
        worker.submit(request, inbox.put)
    found = [text_of(inbox) for inbox in inboxes]
    assert found == [answer.text for answer in engine.answer(asked[:3])]
    assert worker.num_open == 0


def test_the_queue_is_bounded(engine: Engine, gate: threading.Semaphore, worker: Worker) -> None:
    (request, *_) = some_requests(engine)
    inboxes: list[Inbox] = [queue.SimpleQueue() for _ in range(3)]
    for inbox in inboxes:
        worker.submit(request, inbox.put)
    with pytest.raises(BusyError, match=r"2 requests are being answered and 1 wait"):
        worker.submit(request, inboxes[0].put)
    gate.release(100)
    assert len({text_of(inbox) for inbox in inboxes}) == 1
    worker.submit(request, inboxes[0].put)
    assert text_of(inboxes[0])


def test_cancelled_requests_give_their_place_back(
    engine: Engine, gate: threading.Semaphore, worker: Worker
) -> None:
    """One in flight, one that waits, one that is done: afterwards nothing is open, long before 100 tokens."""
    request = some_requests(engine, tokens=60)[0]
    inboxes: list[Inbox] = [queue.SimpleQueue() for _ in range(3)]
    tickets = [worker.submit(request, inbox.put) for inbox in inboxes]
    gate.release(2)
    inboxes[0].get(timeout=TIMEOUT_S)
    for ticket in (*tickets, tickets[0]):
        worker.cancel(ticket)
    gate.release(1)
    wait_until(lambda: worker.num_open == 0)
    short: Inbox = queue.SimpleQueue()
    worker.submit(some_requests(engine)[0], short.put)
    gate.release(100)
    assert text_of(short) == engine.answer(some_requests(engine)[:1])[0].text
    assert inboxes[2].empty()


@pytest.mark.parametrize("failing", ["_prefill", "_decode"])
def test_a_failed_step_is_told_and_survived(
    failing: str, engine: Engine, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    """Out of memory: nor is there any for a second cache beside the first."""
    (request, *_) = some_requests(engine)
    whole, allocate = getattr(Flight, failing), KeyValueCache.empty

    def fail(*_: object, **__: object) -> None:
        monkeypatch.setattr(Flight, failing, whole)
        raise RuntimeError("out of memory")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no room for another cache")

    monkeypatch.setattr(Flight, failing, fail)
    monkeypatch.setattr(KeyValueCache, "empty", refuse)
    inbox: Inbox = queue.SimpleQueue()
    worker.submit(request, inbox.put)
    while not isinstance(error := inbox.get(timeout=TIMEOUT_S), Exception):
        assert failing == "_decode"
    assert str(error) == "out of memory"
    wait_until(lambda: worker.num_open == 0)
    worker.submit(request, inbox.put)
    text = text_of(inbox)
    monkeypatch.setattr(KeyValueCache, "empty", allocate)
    assert text == engine.answer([request])[0].text
