# SPDX-License-Identifier: Apache-2.0
"""How a command of this package ends: `if __name__ == "__main__": end_with(main)`.

The first Ctrl-C raises KeyboardInterrupt in `main`, so that half-written results are removed on the way out; then one
line says so and the exit code is 130. The second ends the process at once, whatever it is removing or waiting for. The
trainer does more at a Ctrl-C (stop_signals.py). No torch."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT, as in shells."""


def end_with(main: Callable[[], int], *, after_interrupt: str = "") -> NoReturn:
    """Leave the process with main's exit code. `after_interrupt`: what the user can do after a Ctrl-C."""
    signal.signal(signal.SIGINT, _Interrupts())
    try:
        code = main()
    except KeyboardInterrupt:
        print("; ".join(filter(None, ["interrupted", after_interrupt])), file=sys.stderr)
        _leave()
    sys.exit(code)


class _Interrupts:
    """Handler of SIGINT: the first is an exception, the second the end."""

    def __init__(self) -> None:
        self._came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            os._exit(INTERRUPTED)
        self._came = True
        raise KeyboardInterrupt


def _leave() -> NoReturn:
    """Leave at once: the interpreter would wait for threads that still work."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader has gone, too
            continue
    os._exit(INTERRUPTED)
