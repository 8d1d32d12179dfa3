# SPDX-License-Identifier: Apache-2.0
"""Names in RUN_DIR: the run's checkpoints, checkpoints/step_00000100, and `latest`, which holds the newest one's name;
the two files of every checkpoint; the files by which a run and its launcher talk. No torch: a dry run and
slurm/launcher.py read them, too."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
LATEST = "latest"
COMPLETE = "complete.json"  # written last: a folder without it is no checkpoint
CONFIG = "config.txt"  # the resolved configuration of the run, or the model of a converter
STOP_FILE = "STOP"  # in RUN_DIR: asks a run to stop
LATEST_STEP_FILE = "latest_step"  # in RUN_DIR: step of the newest checkpoint, as text
DONE_FILE = "DONE"  # in RUN_DIR: the run's last step is done and saved

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
