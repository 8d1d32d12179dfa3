# SPDX-License-Identifier: Apache-2.0
"""The batch script's process: checks the nodes, starts the ranks, hands signals on, and decides how the job ends.

    python -m slurm.launcher RUN_DIR -- srun ... slurm/rank.sh python -m megatron_eve.train RECIPE run_dir=RUN_DIR

Protocol with the trainer, all in files of RUN_DIR because exit codes and signals get lost on the way:
  latest_step  last saved step as text (trainer writes)
  DONE         the last step is done (trainer writes); nothing else counts as success
  STOP         all ranks stop after the same step, save and exit 0. This process writes it on SIGUSR2 (time limit) and
               SIGTERM with the text `requeue`; a person writes it with any other text: then the job is not requeued
  launcher/    what this process knows of earlier starts: starts.jsonl, bad_nodes.txt
Ends with 0 only when DONE exists. Otherwise the job is requeued under the same id, so a chain of `afterok` holds,
unless it was cancelled, stopped by a person, or used up EVE_MAX_RESTARTS or EVE_MAX_NO_PROGRESS.
Source of the rules: each is a case seen on Slurm 22.05, docs/slurm.md has the table; tests/slurm runs them.
"""

import argparse
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slurm import preflight

LAUNCHER_STOP = "requeue"
"""Text of a STOP file that this process wrote; any other text is a person's wish."""

log = logging.getLogger("slurm.launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What Slurm and the site say of this job."""

    job_id: str
    restart: int  # 0 at the first start
    node_list: str  # Slurm's compressed form
    num_nodes: int
    num_tasks: int
    max_restarts: int
    max_no_progress: int
    stop_grace_s: float

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Job":
        """Read the job from Slurm's variables. Exits with 2 and the name of a missing one."""
        try:
            return cls(
                job_id=env["SLURM_JOB_ID"],
                restart=int(env.get("SLURM_RESTART_COUNT", "0")),
                node_list=env["SLURM_JOB_NODELIST"],
                num_nodes=int(env["SLURM_NNODES"]),
                num_tasks=int(env["SLURM_NTASKS"]),
                max_restarts=int(env.get("EVE_MAX_RESTARTS", "50")),
                max_no_progress=int(env.get("EVE_MAX_NO_PROGRESS", "3")),
                stop_grace_s=float(env.get("EVE_STOP_GRACE_S", "480")),
            )
        except KeyError as error:
            log.error("found no %s in the environment; start this through sbatch", error)
            raise SystemExit(2) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """The files through which launcher and trainer talk."""

    path: Path

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def step(self) -> int:
        """Last saved step; 0 before the first checkpoint."""
        try:
            return int((self.path / "latest_step").read_text())
        except FileNotFoundError:
            return 0

    @property
    def stopped_by_person(self) -> bool:
        try:
            return (self.path / "STOP").read_text().strip() != LAUNCHER_STOP
        except FileNotFoundError:
            return False

    def write_stop(self) -> None:
        """Ask the ranks to stop; a person's STOP stays as it is."""
        if not (self.path / "STOP").exists():
            (self.path / "STOP").write_text(LAUNCHER_STOP)

    def clear_own_stop(self) -> None:
        """Remove the STOP file that the start before this one left."""
        if not self.stopped_by_person:
            (self.path / "STOP").unlink(missing_ok=True)

    def record_start(self, job: Job) -> None:
        """Append this start, so that the next one can see whether anything moved in between."""
        line = {
            "job": job.job_id,
            "restart": job.restart,
            "step": self.step,
            "nodes": job.node_list,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
        }
        with (self.path / "launcher" / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def starts_without_progress(self, job: Job) -> int:
        """How many of this job's latest starts began at the step where the run still is."""
        try:
            text = (self.path / "launcher" / "starts.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return 0
        steps = [s["step"] for s in map(json.loads, text.splitlines()) if s["job"] == job.job_id]
        count = 0
        for step in reversed(steps):
            if step < self.step:
                break
            count += 1
        return count

    def add_bad_nodes(self, nodes: Sequence[str]) -> list[str]:
        """Remember nodes that failed a check; returns all that ever did in this run."""
        file = self.path / "launcher" / "bad_nodes.txt"
        known = file.read_text().split() if file.exists() else []
        everything = sorted({*known, *nodes})
        file.write_text("\n".join(everything) + "\n")
        return everything


def git_commit() -> str:
    """Commit of the checkout, with a `+` when it has changes; `unknown` outside of git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def host_names(node_list: str) -> list[str]:
    """Expand `node[01-16]` with scontrol."""
    command = ["scontrol", "show", "hostnames", node_list]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def rendezvous(job: Job, hosts: Sequence[str]) -> dict[str, str]:
    """Variables with which the ranks find each other; the port differs between jobs that share a node and lies below
    Linux' range of ephemeral ports."""
    port = 20000 + int(job.job_id) % 12000
    return {
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(job.num_tasks),
    }


class Ranks:
    """The running `srun`, and the signals that reach this process while it runs."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_at: float | None = None
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def stopping(self) -> bool:
        """Whether the ranks were asked to stop."""
        return self._asked_at is not None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """STOP file and signal: the file also reaches ranks that are still starting."""
        log.info("got %s: the ranks save and stop", signal.Signals(number).name)
        self._asked_at = self._asked_at or time.monotonic()
        self._folder.write_stop()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)

    def run(self, command: Sequence[str], *, env: Mapping[str, str]) -> int:
        """Run to the end and return the exit code; does not start when a signal came before."""
        if self.stopping:
            return 0
        self._process = subprocess.Popen(command, env=dict(env))
        while True:
            try:
                return self._process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                self._kill_hanging()

    def _kill_hanging(self) -> None:
        """Ranks that do not stop when asked (a collective that hangs) must not take the job to its time limit, where
        nobody is left to requeue it."""
        if self._asked_at is None or time.monotonic() - self._asked_at < self._job.stop_grace_s:
            return
        log.error(
            "the ranks did not stop within EVE_STOP_GRACE_S=%g: killing them",
            self._job.stop_grace_s,
        )
        subprocess.run(
            ["scancel", "--signal=KILL", self._job.job_id]
        )  # steps only, not this script
        self._asked_at = time.monotonic()

    def ignore_signals(self) -> None:
        """From here on only Slurm's SIGKILL ends this process."""
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def slurm_is_ending_it(job: Job) -> str | None:
    """Why requeueing is not this process's business: after scancel it would bring the job back against its owner's
    will, after a node's death or a requeue by hand Slurm does it. None while the job counts as running, and at the time
    limit, when a save outlasted the signal's ten minutes."""
    command = ["scontrol", "show", "job", "--oneliner", job.job_id]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    fields = dict(re.findall(r"(\w+)=(\S+)", text))
    state = fields.get("JobState", "RUNNING")
    if state == "RUNNING" or fields.get("Reason") == "TimeLimit":
        return None
    return f"Slurm is ending the job by itself, JobState={state}"


def requeue(job: Job, *, folder: RunFolder, ranks: Ranks, why: str, exclude: Sequence[str]) -> int:
    """Put the job back into the queue, or say why not. Returns the exit code of this process."""
    ending = slurm_is_ending_it(job)
    if ending:
        log.info("not requeued (%s): %s", why, ending)
        return 1
    if job.restart >= job.max_restarts:
        log.error("not requeued (%s): EVE_MAX_RESTARTS=%d is used up", why, job.max_restarts)
        return 1
    stuck = folder.starts_without_progress(job)
    if stuck >= job.max_no_progress:
        log.error(
            "not requeued (%s): %d starts ended at step %d; EVE_MAX_NO_PROGRESS=%d; the last rank logs are in %s",
            why,
            stuck,
            folder.step,
            job.max_no_progress,
            os.environ.get("RANK_LOGS"),
        )
        return 1
    log.info("requeue: %s", why)
    ranks.ignore_signals()
    if subprocess.run(["scontrol", "requeue", job.job_id]).returncode:
        log.error(
            "Slurm refused to requeue job %s; was it submitted with --no-requeue?", job.job_id
        )
        return 1
    if exclude:
        exclude_nodes(job, exclude)
    time.sleep(300)  # Slurm ends this process long before
    return 1


def exclude_nodes(job: Job, nodes: Sequence[str]) -> None:
    """Keep the requeued job off these nodes. Slurm accepts it only once the job counts as pending."""
    command = ["scontrol", "update", f"JobId={job.job_id}", f"ExcNodeList={','.join(nodes)}"]
    for _ in range(20):
        if subprocess.run(command, capture_output=True).returncode == 0:
            log.info("excluded %s", ",".join(nodes))
            return
        time.sleep(0.5)
    log.error("could not exclude %s; use sbatch --exclude", ",".join(nodes))


def run(job: Job, *, folder: RunFolder, command: Sequence[str]) -> int:
    """One start of the job, from checks to decision. Returns the exit code."""
    if folder.done:
        log.info("%s/DONE exists: nothing to do", folder.path)
        return 0
    if folder.stopped_by_person:
        log.error("found %s/STOP written by a person; remove it to train on", folder.path)
        return 1
    (folder.path / "launcher").mkdir(parents=True, exist_ok=True)
    if "RANK_LOGS" in os.environ:
        Path(os.environ["RANK_LOGS"]).mkdir(parents=True, exist_ok=True)
    folder.clear_own_stop()
    ranks = Ranks(job, folder)
    hosts = host_names(job.node_list)
    bad = preflight.check_nodes(hosts, run_dir=folder.path)
    folder.record_start(job)
    if len(bad) > len(hosts) // 2:
        log.error(
            "preflight failed on %d of %d nodes: not a matter of single nodes, not requeued",
            len(bad),
            len(hosts),
        )
        return 1
    if bad:
        exclude = folder.add_bad_nodes(bad)
        why = f"preflight failed on {','.join(bad)}"
        return requeue(job, folder=folder, ranks=ranks, why=why, exclude=exclude)

    first = folder.step
    env = {**os.environ, **rendezvous(job, hosts)}
    log.info(
        "start %d on %s: %d ranks, %s:%s, step %d, commit %s, ranks' logs in %s",
        job.restart,
        job.node_list,
        job.num_tasks,
        env["MASTER_ADDR"],
        env["MASTER_PORT"],
        first,
        git_commit(),
        env.get("RANK_LOGS"),
    )
    code = ranks.run(command, env=env)
    log.info("the ranks ended with %d, step %d -> %d", code, first, folder.step)
    if code == 0 and folder.done:
        log.info("done")
        return 0
    if folder.stopped_by_person:
        log.info("stopped by %s/STOP at step %d: not requeued", folder.path, folder.step)
        return 1
    why = "stopped before the end" if code == 0 or ranks.stopping else f"failed with {code}"
    return requeue(job, folder=folder, ranks=ranks, why=why, exclude=[])


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.launcher",
        description="Start the ranks of a Slurm job and decide how it ends.",
        epilog="Example (inside a batch script): python -m slurm.launcher runs/a -- srun slurm/rank.sh "
        "python -m megatron_eve.train eve7b_stage1 run_dir=runs/a",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="folder of the run, shared by all nodes"
    )
    parser.add_argument("command", metavar="COMMAND", nargs="+", help="after --: the srun line")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.launcher`."""
    args = parse_args(argv)
    job_name, restart = (
        os.environ.get("SLURM_JOB_NAME", "?"),
        os.environ.get("SLURM_RESTART_COUNT", "0"),
    )
    tag = f"{job_name} {os.environ.get('SLURM_JOB_ID', '?')} r{restart}"
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s [{tag}] %(message)s", stream=sys.stdout
    )
    return run(Job.from_env(os.environ), folder=RunFolder(path=args.run_dir), command=args.command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
