# SPDX-License-Identifier: Apache-2.0
"""The signals that ask a training process to stop, noticed whatever its main thread does, even an import of torch.

    Ctrl-C before the first step    ends at once with exit code 130: there is nothing to save
    Ctrl-C, SIGTERM, SIGUSR2 later  the run stops after its step and saves
    Ctrl-C once more                ends at once; so does SIGTERM after it, which torchrun makes of the second

Python runs handlers in the main thread, between two operations of the interpreter, so never while it waits for a rank
that has gone. Here a pipe (signal.set_wakeup_fd) brings signals to a thread that does nothing else."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from megatron_eve.command import INTERRUPTED

STOPS = (signal.SIGUSR2, signal.SIGTERM)

_END = b"\0"
_ONE_PRESS_S = 0.2  # the terminal and a launcher that passes it on may both send one


class StopSignals:
    """Whether this process was asked to stop. Enter it in the main thread."""

    def __init__(self, *, rank: int) -> None:
        """`rank`: only rank 0 prints."""
        self._is_speaker = rank == 0
        self._asked = self._interrupted = self._may_save = False
        self._pressed_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True, name="stop-signals")
        self._thread.start()
        self._catch(signal.SIGINT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._writer, _END)
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    @property
    def asked(self) -> bool:
        """Whether the run is to stop."""
        return self._asked

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C that asked."""
        return self._interrupted

    def catch_stops(self) -> None:
        """From here on SIGTERM and SIGUSR2 ask, too. Earlier they end the process."""
        for number in STOPS:
            self._catch(number)

    def may_save(self) -> None:
        """From here on a Ctrl-C has something to save."""
        self._may_save = True

    def _catch(self, number: int) -> None:
        self._previous[number] = signal.signal(number, _heard_elsewhere)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number == _END[0]:
                    return
                if number == signal.SIGINT:
                    self._take_interrupt()
                elif number in STOPS:
                    self._take_stop(number)

    def _take_stop(self, number: int) -> None:
        if self._interrupted and number == signal.SIGTERM:
            self._end("ended at once; the next start goes on from the newest checkpoint")
        self._asked = True

    def _take_interrupt(self) -> None:
        pressed_before, self._pressed_at = self._pressed_at, time.monotonic()
        if self._interrupted:
            if self._pressed_at - pressed_before > _ONE_PRESS_S:
                self._end("ended at once; the next start goes on from the newest checkpoint")
            return
        if not self._may_save:
            self._end("interrupted before the first step; nothing is lost")
        self._interrupted = self._asked = True
        self._tell("Ctrl-C: the run stops after this step and saves; once more ends it at once")

    def _end(self, why: str) -> None:
        self._tell(why)
        os._exit(INTERRUPTED)

    def _tell(self, text: str) -> None:
        if self._is_speaker:
            # Not by logging: the main thread may hold its lock for ever.
            os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())


def _heard_elsewhere(number: int, frame: FrameType | None) -> None:
    """The pipe has it already."""
