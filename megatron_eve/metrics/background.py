# SPDX-License-Identifier: Apache-2.0
"""A sink of an optional service, in a thread of its own: the service's errors, waits and silence never reach the run.
Records wait in memory until the service takes them; metrics.jsonl has them all."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

_THREAD = "optional-service"
_LOG = logging.getLogger(__name__)


class Service(Protocol):
    """The service that runs in the thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class BackgroundSink:
    """Takes the values of a step at once, and passes them on when it can."""

    def __init__(self, name: str, open_service: Callable[[], Service], *, close_s: float) -> None:
        """`name`: for messages. `close_s`: how long a run waits for the service at its end."""
        self._name, self._open, self._close_s = name, open_service, close_s
        self._records: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name=_THREAD)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._has_failed:
            self._records.put((step, dict(values)))

    def close(self) -> None:
        """Wait for the service, but not for ever."""
        self._records.put(None)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            _LOG.warning(
                "%s has not taken the last records within %.0f s: left behind; metrics.jsonl has them all",
                self._name,
                self._close_s,
            )

    def _serve(self) -> None:
        try:
            service = self._open()
            while (record := self._records.get()) is not None:
                service.log(*record)
            service.close()
        except BaseException as error:  # a service may also raise SystemExit
            self._has_failed = True
            _LOG.warning("%s failed: %s", self._name, told(error))


def told(error: BaseException) -> str:
    """An error of a service, whose messages are long, as part of a line, and its effect on the run."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first}; the run goes on without it, metrics.jsonl has every record"


def is_left_behind() -> bool:
    """Whether the thread of a service still runs. Then the process must not end as usual: the service would wait."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
