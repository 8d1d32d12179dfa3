# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of a job on a cluster, without GPU, torch or data: follows the trainer's side of the protocol of
slurm.launcher, so that time-limit signals, requeue, chains and node failures can be tried in minutes.

    TRAIN_CMD="python3 -m slurm.rehearse" sbatch --time=10 slurm/stage2_2.sbatch

Takes RECIPE and overrides like megatron_eve.train and reads only run_dir of them; steps are sleeps. Not rehearsed: the
collective decision to stop (each rank decides for itself here) and everything that needs a device.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_eve.run_files import DONE_FILE, LATEST_STEP_FILE, STOP_FILE
from megatron_eve.whole import write_text

from .folder import read_step


class StopFlag:
    """Set by SIGUSR2 and SIGTERM; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True


def rehearse(
    run_dir: Path, *, rank: int, steps: int, step_s: float, save_every: int, fail_at: int | None
) -> None:
    """Sleep through the steps, with rank 0 writing latest_step and DONE."""
    stop = StopFlag()
    latest = run_dir / LATEST_STEP_FILE
    step = read_step(latest) or 0
    print(
        f"rank {rank}/{os.environ['WORLD_SIZE']} on {os.environ.get('SLURMD_NODENAME', os.uname().nodename)} "
        f"local {os.environ['LOCAL_RANK']} master {os.environ['MASTER_ADDR']} from step {step}",
        flush=True,
    )
    if rank == 0 and step < steps:
        (run_dir / DONE_FILE).unlink(missing_ok=True)  # of fewer steps
    while step < steps:
        time.sleep(step_s)
        step += 1
        if step == fail_at:
            raise SystemExit(f"rank {rank} fails at step {step}, as asked with --fail-at")
        stopping = stop.is_set or (run_dir / STOP_FILE).exists()
        if rank == 0 and (stopping or step % save_every == 0 or step == steps):
            write_text(latest, str(step))
        if stopping:
            print(f"rank {rank} stops at step {step}", flush=True)
            return
    if rank == 0:
        write_text(run_dir / DONE_FILE, f"{step}\n")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The trainer's positional arguments, and what a rehearsal needs, from the environment or as options."""
    parser = argparse.ArgumentParser(
        prog="python -m slurm.rehearse",
        description="Stand-in for the trainer: rehearse signals, requeue and chains of a job.",
        epilog='Example: TRAIN_CMD="python3 -m slurm.rehearse --steps 60" sbatch slurm/stage2_2.sbatch',
    )
    parser.add_argument("recipe", metavar="RECIPE", help="only printed")
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="only run_dir=... is read",
    )
    parser.add_argument("--steps", type=int, default=30, help="steps of the rehearsed run")
    parser.add_argument("--step-s", type=float, default=0.3, help="seconds a step")
    parser.add_argument("--save-every", type=int, default=5, help="steps between two checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="say how many steps, and end")
    parser.add_argument("--fail-at", type=int, default=None, help="step at which every rank fails")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m slurm.rehearse`."""
    args = parse_args(argv)
    run_dirs = [text.partition("=")[2] for text in args.overrides if text.startswith("run_dir=")]
    if len(run_dirs) != 1:
        print(f"found {len(run_dirs)} run_dir=..., expected one", file=sys.stderr)
        return 2
    if args.dry_run:
        print(f"train.steps: {args.steps}")
        return 0
    rank = int(os.environ["RANK"])
    rehearse(
        Path(run_dirs[0]),
        rank=rank,
        steps=args.steps,
        step_s=args.step_s,
        save_every=args.save_every,
        fail_at=args.fail_at,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
