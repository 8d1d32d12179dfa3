# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C and the stop signals do to a process that trains, also while its main thread hears nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_eve.command import INTERRUPTED

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 60
SETTLED_S = 0.4  # two signals farther apart are two presses
WAITS = "while not signals.asked: time.sleep(0.01)"
# A mutex locked twice: no signal ends this wait, as none ends that for a rank which has gone.
DEAF = "ctypes.CDLL(None).pthread_mutex_lock(mutex); ctypes.CDLL(None).pthread_mutex_lock(mutex)"
SCRIPT = """
import ctypes, sys, time
from megatron_eve.stop_signals import StopSignals
mutex = ctypes.create_string_buffer(64)
with StopSignals(rank={rank}) as signals:
    signals.catch_stops()
    if {may_save}:
        signals.may_save()
    print("ready", flush=True)
    {body}
assert "torch" not in sys.modules
print("saved", flush=True)
"""


def ended(
    numbers: Sequence[signal.Signals], *, body: str, rank: int = 0, may_save: bool = True
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that gets these signals, one after the other."""
    script = SCRIPT.format(body=body, rank=rank, may_save=may_save)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(SETTLED_S if len(numbers) > 1 else 0)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_the_first_one_asks_the_run_to_stop(number: signal.Signals) -> None:
    code, out, err = ended([number], body=WAITS)
    assert (code, out) == (0, "saved\n")
    assert len(err.splitlines()) == (number == signal.SIGINT)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_once_more_ends_a_process_that_hears_nothing(second: signal.Signals) -> None:
    """torchrun passes on the first Ctrl-C, and sends SIGTERM at the second."""
    code, out, err = ended([signal.SIGINT, second], body=DEAF)
    assert (code, out) == (INTERRUPTED, "")
    assert [line.split(" ", 1)[1] for line in err.splitlines()] == [
        "Ctrl-C: the run stops after this step and saves; once more ends it at once",
        "ended at once; the next start goes on from the newest checkpoint",
    ]


def test_before_the_first_step_ctrl_c_ends_at_once() -> None:
    code, out, err = ended([signal.SIGINT], body=DEAF, may_save=False)
    assert (code, out) == (INTERRUPTED, "")
    assert err.endswith(" interrupted before the first step; nothing is lost\n")
    assert len(err.splitlines()) == 1


def test_slurms_signals_one_after_the_other_let_the_run_save() -> None:
    body = "time.sleep(3 * 0.4); assert signals.asked and not signals.interrupted"
    code, out, err = ended([signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM], body=body)
    assert (code, out, err) == (0, "saved\n", "")


def test_only_the_first_rank_speaks() -> None:
    assert ended([signal.SIGINT, signal.SIGINT], body=DEAF, rank=3) == (INTERRUPTED, "", "")


def test_a_press_that_arrives_twice_is_one_press() -> None:
    """From the terminal, and from a launcher that passes it on."""
    press = "os.kill(os.getpid(), signal.SIGINT)"
    twice = f"import os, signal; {press}; {press}; time.sleep(1); assert signals.interrupted"
    code, out, _ = ended([], body=twice)
    assert (code, out) == (0, "saved\n")
