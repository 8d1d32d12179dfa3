# SPDX-License-Identifier: Apache-2.0
"""How every command of this package ends: `@reports_errors` on its main, which `end_with(main)` calls.

Exit codes: 0 done, 1 failed, 2 wrong usage (an option, a configuration, a destination that is taken), 130 interrupted.
What we expect to go wrong is one line, `error: ...`; a defect keeps its traceback.

The first Ctrl-C raises KeyboardInterrupt in `main`, so that half-written results are removed on the way out; then one
line says so and the exit code is 130. The second ends the process at once, whatever it is removing or waiting for. The
trainer does more at a Ctrl-C (stop_signals.py). No torch."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, ParamSpec

from megatron_eve.errors import EveError

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 + SIGINT, as in shells."""


Parameters = ParamSpec("Parameters")


def exit_code(error: Exception) -> int:
    """2 also tells slurm/launcher.py that another start would fail alike."""
    return 2 if isinstance(error, EveError) and error.is_final else 1


def reports_errors(main: Callable[Parameters, int]) -> Callable[Parameters, int]:
    """A main whose errors, ours and the system's, are told on stderr and returned as exit code.

    Processes that torchrun starts find the same at their start and share one stderr: the first of a node tells it.
    Under Slurm each tells it: every rank has a log of its own, and the launcher shows that of the first to fail."""

    @functools.wraps(main)
    def reporting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (EveError, OSError) as error:
            if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["LOCAL_RANK"] == "0":
                print(f"error: {error}", file=sys.stderr)
            return exit_code(error)

    return reporting


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
