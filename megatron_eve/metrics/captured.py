# SPDX-License-Identifier: Apache-2.0
"""Names of ranges and files, shared by the code that captures steps (profiling.py, ranges.py) and the code that reads
captures (tools.profile). No torch, so that reports can be made anywhere."""

from pathlib import Path

PREFIX = "eve/"  # of every range of ours
BACKWARD = "/backward"  # ends the name of a range that autograd runs
STEP_VALUES = (
    "step_time_s",
    "data_wait_s",
    "vision_tokens",
    "text_tokens",
    "computed_tokens",
    "ideal_flops",
    "executed_flops",
)
"""Metrics (definitions.py) of each captured step in a sidecar."""


def capture_file(folder: Path, *, rank: int, suffix: str) -> Path:
    """The path of a rank's capture; suffixes are .kineto.json, .nsys-rep, .sqlite and .steps.json."""
    return folder / f"rank{rank:04d}{suffix}"
