# SPDX-License-Identifier: Apache-2.0
"""The one thread that runs the model, and the queue in front of it.

Requests come from any thread and join the batch in flight as soon as a row is free; at most `max_waiting` wait, and the
next is refused. An abandoned request is cancelled and gives its row back. If a step fails (a device out of memory),
requests in flight get the error, and later ones are served by the same memory, cleared.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable

from megatron_eve.errors import EveError
from megatron_eve.inference.engine import Engine, Flight, Request, Update

_log = logging.getLogger(__name__)


class BusyError(EveError):
    """No further request may wait."""


class Ticket:
    """A request on its way. `deliver` is called from the worker's thread, with updates or with one exception."""

    def __init__(self, request: Request, deliver: Callable[[Update | Exception], None]) -> None:
        self.request = request
        self.deliver = deliver


class Worker:
    """Start it once; `submit` and `cancel` from any thread."""

    def __init__(self, engine: Engine, *, rows: int, tokens: int, max_waiting: int) -> None:
        """`rows` requests at a time, each with `tokens` tokens of prompt and answer. Allocates the cache."""
        self._rows, self.tokens, self._max_waiting = rows, tokens, max_waiting
        self.capacity = rows + max_waiting  # of requests in flight and waiting
        self._flight = Flight(engine, rows=rows, tokens=tokens)
        self._inbox: queue.SimpleQueue[tuple[str, Ticket | None]] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._numbers: dict[Ticket, int] = {}  # of those in flight
        self._lock = threading.Lock()
        self._num_open = 0  # submitted and not yet done
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; requests in flight get nothing more."""
        self._inbox.put(("stop", None))
        self._thread.join()

    @property
    def num_open(self) -> int:
        """Requests in flight or waiting."""
        with self._lock:
            return self._num_open

    def submit(self, request: Request, deliver: Callable[[Update | Exception], None]) -> Ticket:
        """Raises BusyError if too many wait."""
        with self._lock:
            if self._num_open >= self.capacity:
                raise BusyError(
                    f"{self._rows} requests are being answered and {self._max_waiting} wait; try again later."
                )
            self._num_open += 1
        ticket = Ticket(request, deliver)
        self._inbox.put(("submit", ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Soon nothing more is delivered; a ticket that is done is ignored."""
        self._inbox.put(("cancel", ticket))

    def _run(self) -> None:
        while self._read_inbox():
            while self._waiting and self._flight.num_free:
                ticket = self._waiting.popleft()
                self._numbers[ticket] = self._flight.join(ticket.request)
            if not self._numbers:
                continue
            try:
                self._deliver(self._flight.step())
            except Exception as error:
                _log.exception("a step failed; %d requests are given up", len(self._numbers))
                self._give_up(error)

    def _read_inbox(self) -> bool:
        """Take in what came; wait if there is nothing to compute. False: stop."""
        while True:
            is_idle = not self._numbers and not self._waiting
            try:
                kind, ticket = self._inbox.get(block=is_idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if kind == "submit":
                self._waiting.append(ticket)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
                self._close()
            elif ticket in self._numbers:
                self._flight.cancel(self._numbers.pop(ticket))
                self._close()

    def _deliver(self, updates: list[Update]) -> None:
        tickets = {number: ticket for ticket, number in self._numbers.items()}
        for update in updates:
            ticket = tickets[update.number]
            if update.answer is not None:
                del self._numbers[ticket]
                self._close()
            ticket.deliver(update)

    def _give_up(self, error: Exception) -> None:
        tickets = list(self._numbers)
        self._numbers.clear()
        self._flight.clear()
        for ticket in tickets:
            self._close()
            ticket.deliver(error)

    def _close(self) -> None:
        with self._lock:
            self._num_open -= 1
