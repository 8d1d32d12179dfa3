# SPDX-License-Identifier: Apache-2.0
"""Submits stages as a chain: each starts when the one before has ended well, and is cancelled when that one fails.

    python -m slurm.submit stage1 stage2_1_ld stage2_1_hd stage2_2 stage3

The sbatch files stay the interface: this prints (--dry-run) or runs one plain `sbatch` line a stage. It also makes
logs/, without which Slurm fails a job with no log at all. Requeues keep the job id, so `afterok` holds through them.
Refuses a stage that has no sbatch file, and a folder that is not the repository's root.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAGES = ("stage1", "stage2_1_ld", "stage2_1_hd", "stage2_2", "stage3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One `sbatch` call, before the id of the job it waits for is known."""

    stage: str
    recipe: str
    run_dir: str
    sbatch_args: tuple[str, ...]
    overrides: tuple[str, ...]

    def command(self, *, after: str | None) -> list[str]:
        """The argv; `after` is the id of the job to wait for."""
        chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        file = f"slurm/{self.stage}.sbatch"
        return ["sbatch", "--parsable", *chain, *self.sbatch_args, file, *self.overrides]

    @property
    def env(self) -> dict[str, str]:
        """What the sbatch file reads besides its arguments."""
        return {"RECIPE": self.recipe, "RUN_DIR": self.run_dir}

    def text(self, *, after: str | None) -> str:
        """The same as a line for a shell."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*variables, shlex.join(self.command(after=after))])


def plan(args: argparse.Namespace) -> list[Submission]:
    """One submission a stage, in the order given; each starts from the weights of the one before it in the chain."""
    submissions: list[Submission] = []
    for stage in args.stages:
        weights = [f"checkpoint.load_weights_from={submissions[-1].run_dir}"] if submissions else []
        submissions.append(
            Submission(
                stage=stage,
                recipe=f"{args.model}_{stage}",
                run_dir=str(args.root / f"{args.model}_{stage}"),
                sbatch_args=tuple(args.sbatch_arg),
                overrides=(*weights, *args.override),
            )
        )
    return submissions


def submit(submissions: Sequence[Submission], *, after: str | None) -> list[str]:
    """Submit the chain and return the job ids. A refused stage leaves the earlier ones queued and says so."""
    Path("logs").mkdir(exist_ok=True)
    ids: list[str] = []
    for submission in submissions:
        command = submission.command(after=after)
        result = subprocess.run(
            command, env={**os.environ, **submission.env}, capture_output=True, text=True
        )
        if result.returncode:
            queued = " ".join(ids) or "none"
            raise SystemExit(
                f"sbatch refused {submission.stage}: {result.stderr.strip()} (queued before it: {queued})"
            )
        after = result.stdout.strip().split(";")[0]
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
    parser.add_argument("--model", default="eve7b", help="recipes are MODEL_STAGE (default eve7b)")
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


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.submit`."""
    args = parse_args(argv)
    missing = [stage for stage in args.stages if not Path(f"slurm/{stage}.sbatch").is_file()]
    if missing:
        print(
            f"found no slurm/{missing[0]}.sbatch here; call this from the repository's root",
            file=sys.stderr,
        )
        return 2
    submissions = plan(args)
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
    sys.exit(main(sys.argv[1:]))
