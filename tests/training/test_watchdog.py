# SPDX-License-Identifier: Apache-2.0
"""A rank that does not answer is named, all stacks are written, all processes end; a rank that is busy is left alone.

Most tests run the watchdog without a trainer: processes that meet in a store, and count."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.training.rank_process import RankProcess
from megatron_eve.training.watchdog import is_lost_contact
from tests.support.gloo import forked_from_imports
from tests.training.test_run import TIMEOUT_S, start

RANK = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from megatron_eve.training.watchdog import Watchdog
store = TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=60))
with Watchdog(store.clone(), rank=rank, world_size=size, limit_s={limit}, run_dir=run_dir) as watch:
    watch.at("work")
    store.add("started", 1)
    started.send("started")
    {body}
store.add("left", 1)
while rank == 0 and store.add("left", 0) < size: time.sleep(0.01)
"""
WAIT = "time.sleep(60)"


def run_rank(script: str, errors: Path, **names: Any) -> None:
    """In a process of its own; what it writes to stderr goes to a file."""
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(names["port"]))
    exec(compile(script, "<string>", "exec"), names)


class Ranks:
    """Processes with a watchdog of `limit` seconds each."""

    def __init__(self, run_dir: Path, bodies: list[str], *, limit: float) -> None:
        self.run_dir = run_dir
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._errors = [run_dir / f"stderr{rank}" for rank in range(len(bodies))]
        pipes = [multiprocessing.Pipe(duplex=False) for _ in bodies]
        names = {"size": len(bodies), "port": port, "run_dir": run_dir}
        self.processes = [
            forked_from_imports().Process(
                target=run_rank,
                args=(RANK.format(limit=limit, body=body), self._errors[rank]),
                kwargs={**names, "rank": rank, "started": pipes[rank][1]},
            )
            for rank, body in enumerate(bodies)
        ]
        for process in self.processes:
            process.start()
        for ours, _ in pipes:
            assert ours.recv() == "started"

    def ended(self) -> tuple[list[int | None], str]:
        """Exit codes, and what all wrote to stderr but the store's own warnings."""
        for process in self.processes:
            process.join(TIMEOUT_S)
        lines = [line for path in self._errors for line in path.read_text().splitlines()]
        told = [line for line in lines if line.startswith("rank ") or "Error" in line]
        return [process.exitcode for process in self.processes], "\n".join(told)

    def stacks(self) -> dict[str, str]:
        return {p.name: p.read_text() for p in sorted((self.run_dir / "stacks").glob("*"))}


def test_a_stopped_rank_is_named_and_all_end(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, [WAIT] * 3, limit=3)
    stopped = ranks.processes[1]
    os.kill(stopped.pid, signal.SIGSTOP)
    codes, told = ranks.ended()
    assert codes == [1, 1, 1], told
    host = socket.gethostname()
    assert told.count("\n") == 0, "one rank speaks"
    assert f"rank 1 on {host} (process {stopped.pid}, stopped) has not answered for " in told
    assert "(train.distributed_timeout_s=3); stacks of all ranks: " in told
    stacks = ranks.stacks()
    assert list(stacks) == ["rank0000.txt", "rank0001.txt", "rank0002.txt"]
    assert all('File "<string>", line ' in text for text in stacks.values())


def test_a_stopped_rank_that_keeps_the_store_is_named(tmp_path: Path) -> None:
    """Nobody gets an answer from the store then."""
    ranks = Ranks(tmp_path, [WAIT] * 3, limit=2)
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    for process in ranks.processes[1:]:
        process.join(TIMEOUT_S)
        assert process.exitcode == 1
    ranks.processes[0].kill()
    codes, told = ranks.ended()
    assert codes == [-signal.SIGKILL, 1, 1]
    assert told.startswith(
        "rank 1: ParallelError: rank 0, which keeps the ranks' store at 127.0.0.1:"
    )
    assert told.count("\n") == 0
    assert {"rank0001.txt", "rank0002.txt"} <= set(ranks.stacks())


def test_a_rank_that_is_busy_for_long_is_left_alone(tmp_path: Path) -> None:
    """Four times the limit, in Python and outside of it; also the end, which ranks reach at different times."""
    busy = "until = time.monotonic() + 4\n    while time.monotonic() < until: sum(range(10000))"
    ranks = Ranks(tmp_path, [busy, "time.sleep(4)", "pass"], limit=1)
    codes, told = ranks.ended()
    assert (codes, told) == ([0, 0, 0], "")
    assert not (tmp_path / "stacks").exists(), "nothing was written"


def test_all_that_were_stopped_together_go_on(tmp_path: Path) -> None:
    """Ctrl-Z for longer than the limit."""
    ranks = Ranks(tmp_path, ["time.sleep(7)"] * 2, limit=2)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert ranks.ended() == ([0, 0], "")


def test_a_collective_that_failed_names_the_rank_that_is_gone(tmp_path: Path) -> None:
    lost = (
        "time.sleep(1)\n    raise RuntimeError('[gloo/pair.cc] Connection closed by peer [::1]:1')"
    )
    ranks = Ranks(tmp_path, [lost, WAIT], limit=2)
    ranks.processes[1].kill()
    codes, told = ranks.ended()
    assert codes == [1, -signal.SIGKILL]
    assert f"(process {ranks.processes[1].pid}, gone) has not answered" in told
    assert "Connection closed by peer" in ranks.stacks()["rank0000.txt"]


def test_a_collective_that_failed_while_all_answer_says_where_they_are(tmp_path: Path) -> None:
    late = "watch.at('reading the data of step 7'); time.sleep(60)"
    lost = "time.sleep(1.5); raise RuntimeError('Timed out waiting 2000ms for recv operation')"
    ranks = Ranks(tmp_path, [lost, late], limit=2)
    codes, told = ranks.ended()
    assert codes == [1, 1]
    assert "all ranks answer, but do not meet: " in told
    assert "at reading the data of step 7: 1 ranks (1)" in told


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[x.cc:78] Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("Read error [::1]:80: Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_a_failed_collective_is_lost_contact(error: Exception, is_lost: bool) -> None:
    assert is_lost_contact(error) is is_lost


def test_a_dead_process_is_dead_until_its_parent_asks() -> None:
    code = (
        "import time; from megatron_eve.training.rank_process import RankProcess; "
        "print(RankProcess.own().text(), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    rank, own = RankProcess.from_text(child.stdout.readline()), RankProcess.own()
    assert rank.state(seen_from=own) in ("running", "waiting for a disk")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert rank.state(seen_from=own) == "dead"
    child.wait()
    assert rank.state(seen_from=own) == "gone"


def test_no_other_process_is_taken_for_a_rank(tmp_path: Path) -> None:
    """Numbers of processes are used again, and mean nothing on another machine."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = RankProcess.own()
    fields = {"host": own.host, "machine": own.machine, "pid": child.pid}
    for process in (
        RankProcess(**fields, born="1"),
        RankProcess(**{**fields, "machine": "another"}, born="1"),
    ):
        assert process.state(seen_from=own) in ("gone", "")
        process.end(by=own)
    assert child.poll() is None
    child.kill()
    child.wait()


def test_the_trainer_ends_when_a_rank_is_stopped(overrides, tmp_path):  # type: ignore[no-untyped-def]
    """Under torchrun, whose own words come after ours."""
    parallel = ["parallel.gpus_per_node=2", "parallel.tensor=2", "train.distributed_timeout_s=5"]
    trainer = start([*overrides, *parallel, "train.steps=100000"], processes=2, fresh=True)
    trainer.wait_for_step(tmp_path / "run", 2)
    (rank_1,) = (p for p in trainer.process.children() if p.environ().get("RANK") == "1")
    rank_1.send_signal(signal.SIGSTOP)
    assert trainer.wait() == 1
    told = [line for line in trainer.output.splitlines() if "ParallelError" in line]
    assert len(told) == 1
    assert f"(process {rank_1.pid}, stopped) has not answered for" in told[0]
    assert sorted(p.name for p in (tmp_path / "run" / "stacks").iterdir()) == [
        "rank0000.txt",
        "rank0001.txt",
    ]
