# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C ends every command with one line and exit code 130, and leaves nothing half-written."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from megatron_eve.command import INTERRUPTED
from tests.repo.tree import REPO, python_files, text_of

TIMEOUT_S = 60
# They are Slurm's, which sends no SIGINT, and end ranks by signals of their own.
OF_SLURM = {"slurm/launcher.py", "slurm/preflight.py", "slurm/rehearse.py"}
SCRIPT = """
import sys, threading, time
from pathlib import Path
from megatron_eve.command import end_with
part = Path(sys.argv[1])
def main():
    try:
        part.write_text("half")
        print("ready", flush=True)
        {body}
    finally:
        part.unlink()
        {behind}
    return 3
end_with(main, after_interrupt="try again")
"""


def interrupted(
    tmp_path: Path, *, body: str, behind: str = "pass", presses: int = 1
) -> tuple[int, str, bool]:
    """Exit code, stderr, and whether something is left of a command that gets Ctrl-C."""
    part = tmp_path / "part"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body, behind=behind), str(part)],
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3 if presses > 1 else 0)
    _, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, err, part.exists()


def test_the_first_one_cleans_up_and_says_one_line(tmp_path: Path) -> None:
    result = interrupted(tmp_path, body="time.sleep(60)")
    assert result == (INTERRUPTED, "interrupted; try again\n", False)


def test_no_thread_keeps_a_command_that_was_interrupted(tmp_path: Path) -> None:
    body = "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
    began = time.monotonic()
    assert interrupted(tmp_path, body=body)[0] == INTERRUPTED
    assert time.monotonic() - began < 30, "it waited for the thread"


def test_the_second_one_ends_what_takes_long_to_clean_up(tmp_path: Path) -> None:
    result = interrupted(tmp_path, body="time.sleep(60)", behind="time.sleep(60)", presses=2)
    assert result == (INTERRUPTED, "", False)


def test_without_ctrl_c_the_exit_code_is_the_commands_own(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body="pass", behind="pass"), str(tmp_path / "part")],
        env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (3, "")


def test_every_command_ends_through_it() -> None:
    """Whatever can be started with `python -m`."""
    found = []
    for path in python_files(tests=False):
        last = ast.parse(text_of(path)).body[-1:]
        if last and isinstance(last[0], ast.If) and "__main__" in ast.unparse(last[0].test):
            found.append((path, "end_with(" in ast.unparse(last[0])))
    assert len(found) > 20
    assert {path for path, is_framed in found if not is_framed} == OF_SLURM


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_is_interrupted_publishes_nothing_and_goes_on(
    tmp_path: Path, workers: int
) -> None:
    """Ctrl-C as a terminal sends it: to the command and its worker processes."""
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(3000):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        rows.append({"id": str(number), "image": "a.png", "conversations": turns})
    Image.effect_noise((400, 400), 90).convert("RGB").save(tmp_path / "images" / "a.png")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "shards"
    arguments = [str(tmp_path / "data.json"), str(tmp_path / "images"), str(out)]
    command = [sys.executable, "-m", "data_prep", "build-shards", *arguments]
    process = subprocess.Popen(
        [*command, "--workers", str(workers), "--samples-per-part", "500"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    while line and "done" not in line:
        line = process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == INTERRUPTED, text
    told = [line for line in text.splitlines() if " done (" not in line]
    assert told == ["interrupted; run the same command again to go on"]
    assert not (out / "index.json").exists()
