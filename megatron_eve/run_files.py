# SPDX-License-Identifier: Apache-2.0
"""Names in RUN_DIR: the run's checkpoints, checkpoints/step_00000100, and the newest of them that is whole; the two
files of every checkpoint; the files by which a run and its launcher talk. No torch: a dry run and slurm/launcher.py
read them, too."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from megatron_eve.errors import CheckpointError

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"  # written last: a folder without it is no checkpoint
CONFIG = "config.txt"  # the resolved configuration of the run, or the model of a converter
STOP_FILE = "STOP"  # in RUN_DIR: asks a run to stop
LATEST_STEP_FILE = "latest_step"  # in RUN_DIR: step of the newest checkpoint, as text
DONE_FILE = "DONE"  # in RUN_DIR: the run's last step is done and saved
METRICS_FILE = "metrics.jsonl"  # in RUN_DIR: one record a logged step
PROFILE_FOLDER = "profile"  # in RUN_DIR: captured steps
EVALUATION_METRICS = "metrics.json"  # what an evaluation beside the run leaves in its folder

T = TypeVar("T")
_STEP = re.compile(r"step_(\d{8})")


def step_name(step: int) -> str:
    """`step_00000100`."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a run's checkpoint; None for any other folder."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match and checkpoint.parent.name == CHECKPOINTS else None


def checkpoints_of(run_dir: Path) -> dict[int, Path]:
    """Step -> folder, ascending. A checkpoint gets its name when it is whole (manager.py)."""
    found = ((step_of(path), path) for path in (run_dir / CHECKPOINTS).glob("step_*"))
    return dict(sorted((step, path) for step, path in found if step is not None))


def newest_first(run_dir: Path) -> list[Path]:
    """The run's checkpoints in the order in which a start tries them; empty for any other folder."""
    return list(reversed(checkpoints_of(run_dir).values()))


def first_whole(
    checkpoints: Iterable[Path],
    *,
    check: Callable[[Path], T],
    damage: type[CheckpointError] = CheckpointError,
    skipped: Callable[[Path, CheckpointError], None] | None = None,
) -> tuple[Path, T] | None:
    """The first checkpoint that is whole, and what `check` returned for it; None if none is. `check` raises `damage`
    for one that is not whole, and `skipped` is told of it; any other error ends the search."""
    for path in checkpoints:
        try:
            return path, check(path)
        except damage as error:
            if skipped is not None:
                skipped(path, error)
    return None
