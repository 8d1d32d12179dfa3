# SPDX-License-Identifier: Apache-2.0
"""Two ways to run the sbatch files on one machine: `cluster`, a real Slurm with 16 emulated nodes (marker slurm), and
`stub_slurm`, scripts named srun, scontrol and sbatch on PATH."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slurm.job import Job

REPO = Path(__file__).resolve().parents[2]
TOY = Path(__file__).with_name("toy_slurm.sh")
NODES = os.environ.get("TOY_SLURM_NODES", "16")  # some tests do with 4
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def wait_until(condition: str, check: object, *, timeout_s: float = 60) -> None:
    """Poll `check()` until it is true; fails with `condition` as the reason."""
    assert callable(check)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if check():
            return
        time.sleep(0.2)
    raise AssertionError(f"{condition}: not so after {timeout_s} s")


def saved_step(run_dir: Path) -> int:
    """Last saved step of a run; 0 before the first checkpoint."""
    file = run_dir / "latest_step"
    return int(file.read_text() or 0) if file.exists() else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A running toy Slurm and its commands."""

    env: dict[str, str]

    def run(self, *argv: object, check: bool = True, env: dict[str, str] | None = None) -> str:
        """Run a Slurm command from the repository's root and return what it prints."""
        result = subprocess.run(
            [str(a) for a in argv],
            env={**self.env, **(env or {})},
            cwd=REPO,
            text=True,
            capture_output=True,
            timeout=60,
        )
        if check and result.returncode:
            raise AssertionError(f"{argv}: {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result.stdout

    def toy(self, *argv: str) -> None:
        """toy_slurm.sh node-kill, node-boot."""
        self.run("bash", TOY, *argv)

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(re.findall(r"(\w+)=(\S+)", text.splitlines()[0]))

    def wait(self, job_id: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Poll until the job is in one of the states (default: ended)."""
        wanted, end = states or ENDED, time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job["JobState"] in wanted:
                return job
            if time.monotonic() > end:
                raise AssertionError(
                    f"job {job_id}: {job['JobState']} ({job.get('Reason')}) after {timeout_s} s"
                )
            time.sleep(0.3)


@pytest.fixture(scope="session")
def toy_cluster() -> Iterator[Cluster]:
    """The toy Slurm of this test session; goes down with the test runner even if that is killed."""
    if not shutil.which("slurmctld", path=f"/usr/sbin:{os.environ['PATH']}"):
        pytest.skip("slurm-wlm is not installed")
    if os.geteuid():
        pytest.skip("not root")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "TOY_SLURM_DIR"))}
    up = subprocess.run(
        ["bash", TOY, "up"],
        env={**env, "TOY_SLURM_OWNER": str(os.getpid())},
        text=True,
        stdout=subprocess.PIPE,
        timeout=120,
    )
    assert up.returncode == 0
    env |= dict(word.split("=", 1) for word in shlex.split(up.stdout) if "=" in word)
    yield Cluster(env=env)
    subprocess.run(["bash", TOY, "down"], env=env, check=True, timeout=60)


@pytest.fixture
def cluster(toy_cluster: Cluster) -> Iterator[Cluster]:
    """The toy Slurm with an empty queue and all nodes idle, before and after."""
    yield toy_cluster
    toy_cluster.run("scancel", "-u", "root", check=False)
    wait_until("queue is empty", lambda: not toy_cluster.run("squeue", "-h"))
    idle = ("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D")
    wait_until("all nodes are idle", lambda: toy_cluster.run(*idle).strip() == NODES)


STUB_SRUN = """#!/bin/bash
echo "srun $*" >> "$STUB_LOG"
if [[ "$*" == *rank.sh* ]] && [ "$(grep -c rank.sh "$STUB_LOG")" -le "${STUB_NO_STEP:-0}" ]; then
    echo "srun: error: Unable to create step for job 4711: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR2 "${pids[@]}"' USR2
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURMD_NODENAME=node0$((i + 1)) "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while :; do wait "$pid"; rc=$?; kill -0 "$pid" 2> /dev/null || break; done
    [ $rc = 0 ] || code=$rc
done
exit $code
"""
STUB_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$STUB_LOG"
case "$1 $2" in
    "show hostnames") if [[ "$3" == *\\[* ]]; then printf 'node01\\nnode02\\n'; else tr , '\\n' <<< "$3"; fi ;;
    "show job") echo "JobId=$4 JobState=${STUB_STATE:-RUNNING}" ;;
    requeue*)
        if [ "$(grep -c "scontrol requeue" "$STUB_LOG")" -le "${STUB_AWAY:-0}" ]; then
            echo "slurm_requeue error: Unable to contact slurm controller (connect failure)" >&2; exit 1
        fi
        [ -z "${STUB_REFUSE:-}" ] || exit 1; [ -n "${STUB_KEEP:-}" ] || kill -KILL $PPID ;;
    update*) kill -KILL $PPID ;;
esac
"""
STUB_SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$STUB_LOG"
xargs kill -KILL < "$RUN_DIR/pids"
"""
STUB_SINFO = """#!/bin/bash
echo "sinfo $*" >> "$STUB_LOG"
for node in $STUB_NODES; do echo "$node (null)"; done
"""
STUB_SBATCH = """#!/bin/bash
echo "RECIPE=$RECIPE sbatch $*" >> "$STUB_LOG"
[ "$(wc -l < "$STUB_LOG")" -gt "${STUB_AWAY:-0}" ] || { echo "sbatch: error: ${STUB_WORDS:-}" >&2; exit 1; }
[ "$(wc -l < "$STUB_LOG")" != "${STUB_REFUSE_AT:-}" ] || { echo "sbatch: error: invalid account" >&2; exit 1; }
echo "$((100 + $(wc -l < "$STUB_LOG")));toy"
"""


def make_job(job_id: str, *, restart: int = 0, num_nodes: int = 1) -> Job:
    """A start of a job that gives up after three failures without progress."""
    return Job(
        job_id=job_id,
        restart=restart,
        node_list="a",
        num_nodes=num_nodes,
        num_tasks=8,
        max_restarts=50,
        max_no_progress=3,
        stop_grace_s=1,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StubSlurm:
    """Environment of a job of two ranks, and the log of the Slurm commands that were called."""

    env: dict[str, str]
    log: Path
    run_dir: Path

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def sbatch_file(
        self, *args: str, name: str = "stage2_2", **env: str
    ) -> "subprocess.Popen[str]":
        """Run an sbatch file as Slurm would run it on the first node."""
        return subprocess.Popen(
            ["bash", str(REPO / "slurm" / f"{name}.sbatch"), *args],
            env={**self.env, **env},
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


@pytest.fixture
def stub_slurm(tmp_path: Path) -> StubSlurm:
    """Stubs of Slurm's commands on PATH and the variables of a job of one node with two tasks."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (
        ("srun", STUB_SRUN),
        ("scontrol", STUB_SCONTROL),
        ("sbatch", STUB_SBATCH),
        ("scancel", STUB_SCANCEL),
        ("sinfo", STUB_SINFO),
    ):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    log, run_dir = tmp_path / "calls.log", tmp_path / "run"
    run_dir.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "EVE_"))}
    env |= {
        "PATH": f"{stubs}:{env['PATH']}",
        "STUB_LOG": str(log),
        "RUN_DIR": str(run_dir),
        "PYTHON": shutil.which("python3") or "python3",
        "TRAIN_CMD": "python3 -m slurm.rehearse --step-s 0.05 --steps 10",
        "EVE_MIN_FREE_GIB": "0.001",
        "EVE_SLURM_PATIENCE_S": "2",
        "SLURM_SUBMIT_DIR": str(REPO),
        "SLURM_JOB_NAME": "stage2_2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[01-02]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "2",
    }
    return StubSlurm(env=env, log=log, run_dir=run_dir)
