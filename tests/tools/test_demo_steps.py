# SPDX-License-Identifier: Apache-2.0
"""tools.demo: steps that are done once, failures that name their cause, children that stop with the demo."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eve.errors import ConfigError
from tests.repo.tree import REPO
from tools.demo.steps import Step, plan_lines, run_steps
from tools.process import Command, CommandFailed, run_command, sigterm_interrupts


def python_step(tmp_path: Path, name: str, code: str, *, proof: Path | None = None) -> Step:
    log = tmp_path / "out" / "logs" / f"{name}.log"
    return Step(name=name, commands=(Command(arguments=("-c", code), log=log),), proof=proof)


def counting(tmp_path: Path, name: str) -> Step:
    """Adds a line to a file every time it runs."""
    return python_step(tmp_path, name, f"open({str(tmp_path / name)!r}, 'a').write('ran\\n')")


def runs_of(tmp_path: Path, name: str) -> int:
    path = tmp_path / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_steps_are_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    steps = [counting(tmp_path, "a"), counting(tmp_path, "b")]
    assert run_steps(steps, out=out, stop_after="a") is False
    assert (runs_of(tmp_path, "a"), runs_of(tmp_path, "b")) == (1, 0)
    assert plan_lines(steps, out=out)[0] == "a (already done)"
    assert run_steps(steps, out=out) is True
    assert run_steps(steps, out=out) is True
    assert (runs_of(tmp_path, "a"), runs_of(tmp_path, "b")) == (1, 1)
    assert "[2/2] b: already done" in capsys.readouterr().out


def test_a_failed_step_is_named_and_runs_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "print('loading'); print('\\r 1%\\r 2%'); raise KeyError('no such image')"
    steps = [counting(tmp_path, "a"), python_step(tmp_path, "b", code), counting(tmp_path, "c")]
    with pytest.raises(CommandFailed) as caught:
        run_steps(steps, out=out)
    message = str(caught.value)
    assert message.startswith("step b failed: exit code 1 of: python -c ")
    assert "first error: KeyError: 'no such image'" in message
    assert f"log: {out / 'logs' / 'b.log'}, which ends with:\n    loading\n     2%\n" in message
    assert runs_of(tmp_path, "c") == 0
    run_steps([steps[0], counting(tmp_path, "b"), steps[2]], out=out)
    assert [runs_of(tmp_path, name) for name in "abc"] == [1, 1, 1]


def test_first_error_is_not_lost_in_what_torchrun_adds(tmp_path: Path) -> None:
    lines = [
        "rank 0: DataError: shards are missing",
        *(f"  noise {n}" for n in range(40)),
        "E1122 03:47:45.133000 18 torch/distributed/elastic/multiprocessing/api.py:1] failed",
        "SomethingError: raised by the launcher",
    ]
    step = python_step(tmp_path, "a", f"print({chr(10).join(lines)!r}); raise SystemExit(7)")
    with pytest.raises(CommandFailed) as caught:
        run_steps([step], out=tmp_path / "out")
    assert "exit code 7" in str(caught.value)
    assert "first error: rank 0: DataError: shards are missing" in str(caught.value)
    assert "raised by the launcher" not in str(caught.value).split("log:")[1]


def test_a_step_that_ends_early_is_not_done(tmp_path: Path) -> None:
    """A trainer that was asked to stop exits 0 without DONE."""
    step = python_step(tmp_path, "a", "print('saved')", proof=tmp_path / "DONE")
    with pytest.raises(CommandFailed, match=r"step a failed: stopped before its end .*DONE"):
        run_steps([step], out=tmp_path / "out")
    (tmp_path / "DONE").touch()
    assert run_steps([step], out=tmp_path / "out") is True


def test_other_options_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_steps([python_step(tmp_path, "a", "print(1)")], out=out)
    with pytest.raises(ConfigError, match=r"step a was done with other .*print\(1\).*print\(2\)"):
        run_steps([python_step(tmp_path, "a", "print(2)")], out=out)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="holds something that is no demo"):
        run_steps([], out=tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        run_steps([], out=tmp_path / "thesis.txt")


WAITING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(number, frame):
    (folder / "saved").write_text(str(number))
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(60)
"""
ASKING = """
import pathlib, signal, sys
from tools.process import Command
from tools.demo.steps import Step, run_steps
folder = pathlib.Path(sys.argv[1])
command = Command(arguments=("-c", sys.argv[2], str(folder)), log=folder / "out" / "log",
                  stop_signal=signal.SIGTERM)
run_steps([Step(name="a", commands=(command,))], out=folder / "out")
"""


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def interrupt_when_ready(folder: Path) -> None:
    wait_for((folder / "ready").exists)
    os.kill(os.getpid(), signal.SIGTERM)


def test_interrupted_child_saves_first(tmp_path: Path) -> None:
    command = Command(
        arguments=("-c", WAITING, str(tmp_path)),
        log=tmp_path / "log",
        stop_signal=signal.SIGTERM,
    )
    thread = threading.Thread(target=interrupt_when_ready, args=(tmp_path,))
    with sigterm_interrupts():
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_command(command)
    thread.join()
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    assert (tmp_path / "log").read_text() == "saved\n"


def test_a_launchers_workers_are_asked_themselves(tmp_path: Path) -> None:
    """torchrun that gets the signal itself ends with an error and a page of traceback."""
    launcher = (
        "import subprocess, sys; "
        "sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1], sys.argv[2]]) or print('well'))"
    )
    command = Command(
        arguments=("-c", launcher, WAITING, str(tmp_path)),
        log=tmp_path / "log",
        stop_signal=signal.SIGTERM,
    )
    thread = threading.Thread(target=interrupt_when_ready, args=(tmp_path,))
    with sigterm_interrupts():
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_command(command)
    thread.join()
    assert (tmp_path / "log").read_text() == "saved\nwell\n"


def test_killed_demo_leaves_no_child_and_holds_the_folder(tmp_path: Path) -> None:
    """The child inherits the folder's lock, so a new demo waits for what the old one's child still saves."""
    demo = subprocess.Popen([sys.executable, "-c", ASKING, str(tmp_path), WAITING], cwd=REPO)
    wait_for((tmp_path / "ready").exists)
    with pytest.raises(ConfigError, match="in use by another demo"):
        run_steps([], out=tmp_path / "out")
    demo.kill()
    demo.wait()
    wait_for((tmp_path / "saved").exists)

    def is_free() -> bool:
        try:
            return run_steps([counting(tmp_path, "a")], out=tmp_path / "out")
        except ConfigError:
            return False

    wait_for(is_free)
    assert runs_of(tmp_path, "a") == 1
