# SPDX-License-Identifier: Apache-2.0
"""What those who capture steps (profiling.py, ranges.py) and those who read captures (tools.profile) agree on: names of
ranges and files. No torch, so that reports can be made anywhere."""

from pathlib import Path

PREFIX = "eve/"  # of every range of ours
BACKWARD = "/backward"  # behind the name of a range that autograd runs
PROFILE_FOLDER = "profile"  # in the run directory
STEP_VALUES = (
    "step_time_s",
    "data_wait_s",
    "vision_tokens",
    "text_tokens",
    "computed_tokens",
    "ideal_flops",
    "executed_flops",
)
"""Of definitions.py: what a sidecar holds of each captured step."""


def capture_file(folder: Path, *, rank: int, suffix: str) -> Path:
    """Where a rank's capture lies; suffixes are .kineto.json, .nsys-rep, .sqlite and .steps.json."""
    return folder / f"rank{rank:04d}{suffix}"
