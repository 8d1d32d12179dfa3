# SPDX-License-Identifier: Apache-2.0
"""Asks the trainer about recipe and overrides before anything is started: a mistake there costs no node a minute.

In: the trainer's command line. Out: how many steps it asks for, or its refusal. Asks only commands that have --dry-run
(megatron_eve.train, slurm.rehearse); of any other it knows only a `train.steps=` among the overrides.
"""

import logging
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .outcome import CONFIG_EXIT_CODE

MODULES = ("megatron_eve.train", "slurm.rehearse", "megatron_eve.slurm.rehearse")
TIMEOUT_S = 300.0

log = logging.getLogger("slurm.launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """What is known before the start."""

    refusal: str | None = None
    steps: int | None = None  # None: it depends on the data, or nobody can tell


def trainer_of(command: Sequence[str]) -> list[str]:
    """The trainer's own words in `srun ... slurm/rank.sh TRAINER...`."""
    names = [Path(word).name for word in command]
    return list(command[names.index("rank.sh") + 1 :]) if "rank.sh" in names else list(command)


def look_at(trainer: Sequence[str]) -> Configuration:
    """Ask the trainer by --dry-run. Any failure but a refused configuration is left to the ranks to meet."""
    if not _has_dry_run(trainer):
        return Configuration(steps=_asked_for(trainer))
    try:
        result = subprocess.run(
            [*trainer, "--dry-run"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the configuration could not be checked ahead: %s", error)
        return Configuration(steps=_asked_for(trainer))
    if result.returncode == CONFIG_EXIT_CODE:
        return Configuration(
            refusal=(result.stderr.strip() or result.stdout.strip()).removeprefix("error: ")
        )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [""])[-1]
        log.warning("the configuration could not be checked ahead: %d, %s", result.returncode, last)
        return Configuration(steps=_asked_for(trainer))
    found = re.search(r"^train\.steps: ([0-9]+)$", result.stdout, flags=re.M)
    return Configuration(steps=int(found[1]) if found else None)


def _has_dry_run(trainer: Sequence[str]) -> bool:
    return any(first == "-m" and second in MODULES for first, second in pairwise(trainer))


def _asked_for(trainer: Sequence[str]) -> int | None:
    texts = [word.partition("=")[2] for word in trainer if word.startswith("train.steps=")]
    return int(texts[-1]) if texts and texts[-1].isdigit() else None
