# SPDX-License-Identifier: Apache-2.0
"""The batch script's process: checks the nodes, starts the ranks, passes signals on, and decides how the job ends.

    python -m slurm.launcher RUN_DIR -- srun ... slurm/rank.sh python -m megatron_eve.train RECIPE run_dir=RUN_DIR

Protocol with the trainer, all in files of RUN_DIR because exit codes and signals get lost on the way: slurm/folder.py.
STOP is written on SIGUSR2 (time limit) and SIGTERM. Ends with 0 only when DONE exists, with 2 on a configuration error,
which is final. Otherwise the job is requeued under the same id, so a chain of `afterok` holds, unless it was cancelled,
stopped by a person, has too few good nodes left, or used up EVE_MAX_RESTARTS or EVE_MAX_NO_PROGRESS. Only the ranks'
own failures count as failures without progress (slurm/outcome.py).
Source of the rules: each is a case seen on Slurm 22.05, docs/slurm.md has the table; tests/slurm runs them.
"""

import argparse
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_eve.run_files import DONE_FILE

from . import commands, configuration, outcome, owner, preflight
from .commands import SlurmError
from .folder import RunFolder, rank_log_tail
from .job import Job
from .outcome import End, Outcome
from .ranks import Ranks
from .requeue import requeue, too_few_nodes

log = logging.getLogger("slurm.launcher")


def git_commit() -> str:
    """Commit of the checkout, with a `+` when it has changes; `unknown` outside of git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rendezvous(job: Job, hosts: Sequence[str]) -> dict[str, str]:
    """Variables with which the ranks find each other; the port differs between jobs that share a node and lies below
    Linux' range of ephemeral ports."""
    port = 20000 + int(job.job_id) % 12000
    return {
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(job.num_tasks),
    }


def may_start(job: Job, *, folder: RunFolder, trainer: Sequence[str]) -> int | None:
    """Checks before any node is asked: the exit code, or None to go on."""
    if folder.stopped_by_person:
        log.error("found %s/STOP written by a person; remove it to train on", folder.path)
        return 1
    found = configuration.look_at(trainer)
    if found.refusal is not None:
        log.error("configuration error, final: %s", found.refusal)
        return outcome.CONFIG_EXIT_CODE
    done = folder.done_step
    if done is not None and (found.steps is not None and done >= found.steps):
        log.info(
            "%s/DONE tells of %d steps, %d are asked for: nothing to do",
            folder.path,
            done,
            found.steps,
        )
        return 0
    if (folder.path / DONE_FILE).exists():
        tells = "is half-written" if done is None else f"tells of {done} steps"
        asked = "the data decide how many" if found.steps is None else f"{found.steps}"
        log.info(
            "%s/DONE %s, asked for: %s; the trainer goes on and decides", folder.path, tells, asked
        )
        (folder.path / DONE_FILE).unlink(missing_ok=True)
    return None


def warn_of_no_requeue(job: Job) -> None:
    """SBATCH_NO_REQUEUE in the user's environment silently wins over the file's --requeue."""
    try:
        if commands.job_fields(job.job_id, limit_s=0).get("Requeue") == "0":
            log.warning("submitted with --no-requeue: what does not end the run ends the job")
    except SlurmError as error:
        log.warning("%s", error)


def give_up(job: Job, *, folder: RunFolder, end: End) -> str | None:
    """Why this failure was the last one; None to try again."""
    if end in (End.STOPPED, End.OUTSIDE):
        return None
    stuck = folder.failures_without_progress(job)
    if stuck >= job.max_no_progress:
        return (
            f"{stuck} starts failed at step {folder.step} by the ranks' own fault; "
            f"EVE_MAX_NO_PROGRESS={job.max_no_progress}; the last rank logs are in {os.environ.get('RANK_LOGS')}"
        )
    if folder.requeues_by_trouble(job) >= job.max_restarts:
        return f"EVE_MAX_RESTARTS={job.max_restarts} is used up"
    return None


def finish(
    job: Job,
    found: Outcome,
    *,
    folder: RunFolder,
    ranks: Ranks,
    code: int = 1,
    exclude: Sequence[str] = (),
) -> int:
    """Record how this start ended, and requeue or say why not. Returns the exit code of this process."""
    folder.record_end(job, end=found.end, code=code, why=found.why)
    folder.clear_own_stop()
    if found.end is End.DONE:
        log.info("%s", found.why)
        return 0
    if found.end is End.CONFIG:
        log.error("configuration error, final: %s", found.why)
        return outcome.CONFIG_EXIT_CODE
    if folder.stopped_by_person:
        log.info("stopped by %s/STOP at step %d: not requeued", folder.path, folder.step)
        return 1
    if reason := give_up(job, folder=folder, end=found.end):
        log.error("not requeued (%s): %s", found.why, reason)
        return 1
    ranks.ignore_signals()
    return requeue(job, why=found.why, exclude=exclude)


def check_nodes(job: Job, *, folder: RunFolder, ranks: Ranks, hosts: Sequence[str]) -> int | None:
    """The exit code if nodes failed their check, or None to go on. Raises: SlurmError."""
    bad = preflight.check_nodes(hosts, run_dir=folder.path)
    if not bad:
        return None
    found = Outcome(end=End.NODE, why=f"preflight failed on {','.join(bad)}")
    if len(bad) > len(hosts) // 2:
        why = f"preflight failed on {len(bad)} of {len(hosts)} nodes: not a matter of single nodes, not requeued"
    elif few := too_few_nodes(job, bad=bad):
        why = f"{found.why}; {few}: not requeued. Repair them, or submit with other nodes or fewer"
    else:
        return finish(job, found, folder=folder, ranks=ranks, exclude=bad)
    log.error("%s", why)
    folder.record_end(job, end=End.NODE, code=1, why=why)
    folder.clear_own_stop()
    return 1


def start_ranks(
    job: Job, command: Sequence[str], *, folder: RunFolder, ranks: Ranks, env: Mapping[str, str]
) -> tuple[Outcome, int]:
    """Run srun until the ranks have ended, again as long as Slurm could not start any. The outcome and srun's code."""
    waits = commands.pauses(commands.patience_s())
    while True:
        first = folder.step
        code, text = ranks.run(command, env=env)
        log.info("the ranks ended with %d, step %d -> %d", code, first, folder.step)
        found = outcome.judge(
            code=code,
            text=text,
            is_done=folder.done_step is not None,
            asked=ranks.stopping,
            killed=ranks.killed,
            moved=folder.step > first,
        )
        for line in rank_log_tail(os.environ.get("RANK_LOGS"), found.ranks):
            log.error("rank %d: %s", found.ranks[0], line)
        pause = next(waits, None) if found.end is End.SLURM and not ranks.have_logs else None
        if pause is None or ranks.stopping:
            return found, code
        log.warning("Slurm could not start the ranks: %s; again in %.0f s", found.why, pause)
        time.sleep(pause)


def run(job: Job, *, folder: RunFolder, command: Sequence[str]) -> int:
    """One start of the job, from checks to decision. Returns the exit code."""
    trainer = configuration.trainer_of(command)
    owner.claim(folder.path, job)
    code = may_start(job, folder=folder, trainer=trainer)
    if code is not None:
        return code
    if "RANK_LOGS" in os.environ:
        Path(os.environ["RANK_LOGS"]).mkdir(parents=True, exist_ok=True)
    folder.clear_own_stop()
    ranks = Ranks(job, folder)
    warn_of_no_requeue(job)
    folder.record_start(job, commit=git_commit())
    try:
        hosts = commands.host_names(job.node_list)
        code = check_nodes(job, folder=folder, ranks=ranks, hosts=hosts)
        if code is not None:
            return code
    except SlurmError as error:
        found = Outcome(end=End.SLURM, why=str(error))
        return finish(job, found, folder=folder, ranks=ranks)
    env = {**os.environ, **rendezvous(job, hosts)}
    log.info(
        "start %d on %s: %d ranks, %s:%s, step %d, commit %s, ranks' logs in %s: %s",
        job.restart,
        job.node_list,
        job.num_tasks,
        env["MASTER_ADDR"],
        env["MASTER_PORT"],
        folder.step,
        git_commit(),
        env.get("RANK_LOGS"),
        shlex.join(trainer),
    )
    found, code = start_ranks(job, command, folder=folder, ranks=ranks, env=env)
    return finish(job, found, folder=folder, ranks=ranks, code=code)


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
    try:
        job = Job.from_env(os.environ)
        return run(job, folder=RunFolder(path=args.run_dir), command=args.command)
    except (owner.FolderTakenError, SlurmError) as error:
        log.error("%s; not requeued", error)
    except OSError as error:
        log.error("%s cannot be used: %s; not requeued", args.run_dir, error)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
