# SPDX-License-Identifier: Apache-2.0
"""The commands that capture: one nsys per rank around the trainer, or the trainer alone where it records itself.

One nsys per rank, not one around all of them: a rank's report then holds that rank alone and the others pay nothing.
nsys waits for cudaProfilerStart, which the trainer calls before profile.first_step, so its cost lies in the window."""

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.errors import ConfigError
from megatron_eve.run_files import PROFILE_FOLDER

NSYS = (
    "nsys",
    "profile",
    "--sample=none",  # no CPU sampling and no context switches: they need privileges and slow the host down
    "--cpuctxsw=none",
    "--trace=cuda,nvtx,cublas,cudnn",
    "--capture-range=cudaProfilerApi",
    "--capture-range-end=stop",
    "--cuda-graph-trace=node",
    "--kill=none",  # signals reach the trainer itself, which saves before it stops
    "--force-overwrite=true",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Which steps of which ranks."""

    first_step: int
    last_step: int
    ranks: tuple[int, ...]

    def overrides(self, *, tool: str) -> list[str]:
        """The same as profile.* of a run."""
        return [
            f"profile.tool={tool}",
            f"profile.first_step={self.first_step}",
            f"profile.last_step={self.last_step}",
            f"profile.ranks={','.join(map(str, self.ranks))}",
        ]


def parse_window(text: str) -> Window:
    """`10-12`, `10` or `10-12@0,8` (ranks; without them rank 0), as EVE_PROFILE has it.

    Raises: ConfigError if the text is none of these.
    """
    steps, _, ranks = text.partition("@")
    first, dash, last = steps.partition("-")
    try:
        numbers = int(first), int(last if dash else first)
        chosen = tuple(int(rank) for rank in ranks.split(",")) if "@" in text else (0,)
    except ValueError:
        numbers, chosen = (0, 0), ()
    if not (1 <= numbers[0] <= numbers[1] and chosen and min(chosen) >= 0):
        raise ConfigError(
            f"{text!r} names no steps; write FIRST-LAST or FIRST-LAST@RANK,RANK, e.g. 10-12 or 10-12@0,8."
        )
    return Window(first_step=numbers[0], last_step=numbers[1], ranks=chosen)


def nsys_command(command: Sequence[str], *, folder: Path, rank: int) -> list[str]:
    """`command` of one rank under nsys, which writes FOLDER/rank0000.nsys-rep."""
    return [*NSYS, f"--output={folder / f'rank{rank:04d}'}", *command]


def run_dir_of(command: Sequence[str]) -> Path:
    """The last run_dir=... of a training command. Raises: ConfigError if there is none."""
    named = [word.removeprefix("run_dir=") for word in command if word.startswith("run_dir=")]
    if not named:
        raise ConfigError(
            "the command sets no run_dir=...; add it, so that the captures have a place."
        )
    return Path(named[-1])


def rank_command(command: Sequence[str], *, window: Window, rank: int, nsys: bool) -> list[str]:
    """The command of this rank: every rank gets profile.*, a captured one nsys around it."""
    run_dir = run_dir_of(command)
    full = [*command, *window.overrides(tool="nsys" if nsys else "kineto")]
    if not nsys or rank not in window.ranks:
        return full
    return nsys_command(full, folder=run_dir / PROFILE_FOLDER, rank=rank)


def has_nsys(env: Mapping[str, str]) -> bool:
    """Whether this machine can capture by nsys: it is on PATH and there is a driver for it to trace."""
    driver = Path("/proc/driver/nvidia/version").exists()
    return shutil.which("nsys", path=env.get("PATH")) is not None and driver


def become(command: Sequence[str]) -> None:
    """Replace this process, so that signals and the exit code are the command's own."""
    os.execvp(command[0], list(command))


def shell_line(command: Sequence[str]) -> str:
    """For a person to copy."""
    return shlex.join(command)
