# SPDX-License-Identifier: Apache-2.0
"""Submits stages as a chain: each starts when the one before has ended well, and is cancelled when that one fails.

    python -m slurm.submit stage1 stage2_1_ld stage2_1_hd stage2_2 stage3

The sbatch files stay the interface: this prints (--dry-run) or runs one plain `sbatch` line a stage, on which stands
all that a job needs to know: recipe, folder, overrides and the variables of docs/slurm.md that are set here. The
environment does not reach every job (SBATCH_EXPORT). It also makes logs/, without which Slurm fails a job with no log
at all. Requeues keep the job id, so `afterok` holds through them.
Refuses with exit code 2, before anything is submitted: a stage that has no sbatch file, a recipe or override that the
trainer would refuse.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, EveError

from . import commands

HERE = "slurm"
STAGES = ("stage1", "stage2_1_ld", "stage2_1_hd", "stage2_2", "stage3")

FORWARDED = (
    "PYTHON",
    "TRAIN_CMD",
    "EVE_SITE_ENV",
    "EVE_MAX_RESTARTS",
    "EVE_MAX_NO_PROGRESS",
    "EVE_MIN_FREE_GIB",
    "EVE_SLURM_PATIENCE_S",
    "EVE_STOP_GRACE_S",
    "EVE_PROFILE",
    "EVE_SLURM",
)
"""Variables that decide something in the job."""
LEFT_OUT = (
    "RECIPE",
    "RUN_DIR",
    "SBATCH_NO_REQUEUE",
    "SBATCH_OPEN_MODE",
    "SBATCH_SIGNAL",
    "SBATCH_WAIT",
)
"""Variables that would take from the files what a job needs to survive its time limit; as --sbatch-arg they count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One `sbatch` call, before the id of the job it waits for is known."""

    files: str  # folder of the sbatch file
    stage: str
    recipe: str
    run_dir: str
    sbatch_args: tuple[str, ...]
    overrides: tuple[str, ...]

    settings: tuple[str, ...] = ()
    waits: bool = False  # for weights that an earlier stage of the chain will write

    def command(self, *, after: str | None) -> list[str]:
        """The argv; `after` is the id of the job to wait for."""
        chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        words = [f"{self.files}/{self.stage}.sbatch", self.recipe, f"run_dir={self.run_dir}"]
        return [
            *("sbatch", "--parsable", *chain, *self.sbatch_args),
            *(*words, *self.settings, *self.overrides),
        ]

    def text(self, *, after: str | None) -> str:
        """The same as a line for a shell."""
        return shlex.join(self.command(after=after))


def plan(args: argparse.Namespace) -> list[Submission]:
    """One submission a stage, in the order given; each starts from the weights of the one before it in the chain."""
    submissions: list[Submission] = []
    given = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    family = args.model.rpartition(":")[2]  # the functions' prefix, where a file is named before it
    for stage in args.stages:
        files, settings = sbatch_files(stage), given
        if files != HERE:  # those of the package, which its own interpreter finds from any folder
            settings = {"PYTHON": sys.executable} | given | {"EVE_SLURM": files}
        weights = [f"checkpoint.load_weights_from={submissions[-1].run_dir}"] if submissions else []
        submissions.append(
            Submission(
                files=files,
                stage=stage,
                recipe=f"{args.model}_{stage}",
                run_dir=str(args.root / f"{family}_{stage}"),
                sbatch_args=tuple(args.sbatch_arg),
                overrides=(*weights, *args.override),
                settings=tuple(f"{name}={value}" for name, value in settings.items()),
                waits=bool(weights) and not Path(submissions[-1].run_dir).exists(),
            )
        )
    return submissions


def sbatch_files(stage: str) -> str:
    """Folder of a stage's sbatch file: `slurm` where it has one (a checkout, a site's own copy), else the package's."""
    return HERE if Path(HERE, f"{stage}.sbatch").is_file() else str(Path(__file__).parent)


def refusals(submissions: Sequence[Submission]) -> list[str]:
    """What the trainer would refuse, a line for each stage that has something. Each job asks once more at its start,
    when data and weights are there."""
    if "megatron_eve.train" not in os.environ.get("TRAIN_CMD", "megatron_eve.train"):
        return []  # a stand-in, which reads recipes and overrides in its own way
    try:
        from megatron_eve.train import configure
    except ImportError as error:
        print(
            f"recipes are not checked here ({error}); the job does it as it starts", file=sys.stderr
        )
        return []
    found = []
    for submission in submissions:
        overrides = [
            text
            for text in submission.overrides
            if not (submission.waits and text.endswith("=from_weights"))
        ]
        try:
            configure(submission.recipe, overrides=[f"run_dir={submission.run_dir}", *overrides])
        except ConfigError as error:
            found.append(f"{submission.stage}: {error}")
    return found


def sbatch(command: Sequence[str]) -> str:
    """The job's id. A controller that is away is asked again for minutes. Raises: SlurmError."""
    env = {k: v for k, v in os.environ.items() if k not in LEFT_OUT}
    waits = commands.pauses(commands.patience_s())
    while True:
        answer = commands.call(command, env=env)
        if answer.code == 0:
            return answer.out.strip().split(";")[0]
        none_taken = commands.took_none(answer.err)
        pause = next(waits, None) if none_taken else None
        if pause is None:
            queued = answer.is_away and not none_taken
            advice = "; a job may be queued nevertheless: look with squeue --me" if queued else ""
            raise commands.SlurmError(answer.words + advice)
        print(f"sbatch: {answer.words}; again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def submit(submissions: Sequence[Submission], *, after: str | None) -> list[str]:
    """Submit the chain and return the job ids. A refused stage leaves the earlier ones queued and says so."""
    Path("logs").mkdir(exist_ok=True)
    ids: list[str] = []
    for submission in submissions:
        try:
            after = sbatch(submission.command(after=after))
        except commands.SlurmError as error:
            queued = " ".join(ids) or "none"
            raise EveError(
                f"sbatch refused {submission.stage}: {error} (queued before it: {queued})"
            ) from error
        ids.append(after)
        print(f"{submission.stage} {after} {submission.run_dir}", flush=True)
    return ids


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.submit",
        description="Submit stages as a chain of Slurm jobs.",
        epilog="Example: python -m slurm.submit stage2_2 stage3 --sbatch-arg=--account=team --dry-run",
    )
    parser.add_argument(
        "stages", metavar="STAGE", nargs="+", choices=STAGES, help=", ".join(STAGES)
    )
    parser.add_argument(
        "--model",
        default="eve7b",
        help="recipes are MODEL_STAGE (default eve7b); FILE.py:PREFIX takes the functions PREFIX_STAGE of a file",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("runs"),
        help="run folders are ROOT/MODEL_STAGE (default runs)",
    )
    parser.add_argument("--after", metavar="JOBID", help="the first stage waits for this job too")
    parser.add_argument(
        "--sbatch-arg",
        metavar="ARG",
        action="append",
        default=[],
        help="handed to every sbatch, for example --sbatch-arg=--account=team",
    )
    parser.add_argument(
        "--override",
        metavar="section.key=value",
        action="append",
        default=[],
        help="handed to every stage's trainer",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the lines and submit nothing")
    return parser.parse_args(argv)


@reports_errors
def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.submit`."""
    args = parse_args(argv)
    if any(text.startswith("run_dir=") for text in args.override):
        raise ConfigError("found --override run_dir=..., expected --root: each stage has a folder")
    if ignored := [name for name in LEFT_OUT if os.environ.get(name)]:
        print(f"not handed on: {', '.join(ignored)} of the environment", file=sys.stderr)
    submissions = plan(args)
    if refused := refusals(submissions):
        raise ConfigError("\n".join([*refused, "nothing was submitted"]))
    if args.dry_run:
        after = args.after
        for submission in submissions:
            print(submission.text(after=after))
            after = f"${submission.stage.upper()}"
        print(f"dry run: {len(submissions)} jobs, nothing submitted")
        return 0
    ids = submit(submissions, after=args.after)
    print(f"submitted {len(ids)} jobs; batch logs in logs/, runs in {args.root}/")
    return 0


if __name__ == "__main__":
    end_with(lambda: main(sys.argv[1:]))
