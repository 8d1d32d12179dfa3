# SPDX-License-Identifier: Apache-2.0
"""One-node Python jobs on Slurm through submitit: data preparation, conversion, tools. Training uses the sbatch files.

    python -m slurm.jobs --cpus 64 --hours 12 -- data_prep build-shards ...

Runs `python -m MODULE ARGS...` as one job, waits for it, prints its last lines and hands back its exit code. The
commands of this repository take up their work where it was left, so a job that meets its time limit is requeued by
submitit and runs the same line again. --local runs it as a process on this machine, through the same code. A controller
that is away is asked again for minutes.
Refuses modules that are not one-node commands of this repository.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, EveError

from . import commands

PACKAGES = ("data_prep", "checkpoints_convert", "tools", "megatron_eve")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleJob:
    """The object that submitit pickles, sends to the node and calls there."""

    module: str
    args: tuple[str, ...]

    def __call__(self) -> int:
        """Run the module and return its exit code."""
        module = f"megatron_eve.{self.module.removeprefix('megatron_eve.')}"  # in a wheel, too
        return subprocess.run([sys.executable, "-m", module, *self.args]).returncode

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit ahead of the time limit: the same command again, which resumes by itself."""
        return DelayedSubmission(self)


def build_executor(args: argparse.Namespace) -> submitit.Executor:
    """submitit's executor for this machine or for Slurm, with the job's resources."""
    folder = args.logs / "%j"
    if args.local:
        local = submitit.LocalExecutor(folder=folder)
        local.update_parameters(timeout_min=round(args.hours * 60))
        return local
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=args.max_requeues)
    executor.update_parameters(
        job_name=args.command[0].replace(".", "-"),
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=args.cpus,
        time=round(args.hours * 60),
        **({"mem": args.mem} if args.mem else {}),
        srun_args=["--export=ALL"],  # sbatch --export=NONE, a site's default, binds srun too
        additional_parameters=dict(text.split("=", 1) for text in args.sbatch),
    )
    return executor


def submit(executor: submitit.Executor, job: ModuleJob) -> "submitit.Job[int]":
    """The submitted job; again where Slurm took none. Raises: FailedJobError."""
    waits = commands.pauses(commands.patience_s())
    while True:
        try:
            return executor.submit(job)
        except FailedJobError as error:
            words = str(error).strip()
            pause = next(waits, None) if commands.took_none(words) else None
            if pause is None:
                raise
            print(f"{words}; again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.jobs",
        description="Run a one-node command of this repository as a Slurm job.",
        epilog="Example: python -m slurm.jobs --cpus 64 --sbatch partition=cpu -- data_prep build-shards SOURCE OUT",
    )
    parser.add_argument(
        "command", metavar="COMMAND", nargs="+", help="after --: module and its arguments"
    )
    parser.add_argument("--cpus", type=int, default=16, help="CPU cores (default 16)")
    parser.add_argument("--hours", type=float, default=4.0, help="time limit (default 4)")
    parser.add_argument("--mem", help="memory as Slurm writes it, for example 64G")
    parser.add_argument(
        "--sbatch", metavar="KEY=VALUE", action="append", default=[], help="further sbatch option"
    )
    parser.add_argument(
        "--max-requeues", type=int, default=10, help="restarts at the time limit (default 10)"
    )
    parser.add_argument(
        "--logs", type=Path, default=Path("logs/jobs"), help="folder of the jobs' logs"
    )
    parser.add_argument("--local", action="store_true", help="run on this machine instead")
    return parser.parse_args(argv)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.jobs`."""
    args = parse_args(argv)
    module = args.command[0]
    if module.partition(".")[0] not in PACKAGES:
        raise ConfigError(f"found module {module}, expected one of {', '.join(PACKAGES)} or below")
    if any("=" not in text for text in args.sbatch):
        raise ConfigError(f"found --sbatch {args.sbatch}, expected KEY=VALUE each")
    try:
        job = submit(build_executor(args), ModuleJob(module=module, args=tuple(args.command[1:])))
    except FailedJobError as error:
        raise EveError(f"sbatch refused the job: {error}") from error
    print(
        f"job {job.job_id}: python -m {' '.join(args.command)}; log {job.paths.stdout}", flush=True
    )
    try:
        code = int(job.result())
    except (FailedJobError, UncompletedJobError) as error:
        raise EveError(f"job {job.job_id} did not end by itself: {error}") from error
    print("\n".join((job.stdout() or "").rstrip().splitlines()[-5:]))
    print(f"job {job.job_id} ended with {code}; log {job.paths.stdout}")
    return code


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
