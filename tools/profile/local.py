# SPDX-License-Identifier: Apache-2.0
"""A short captured run on this machine, with as many processes as the recipe's layout has.

torchrun starts what slurm/rank.sh starts: `tools.profile exec`, which becomes the trainer, under nsys where that works
and with torch.profiler where it does not."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.errors import ConfigError
from megatron_eve.run_files import CONFIG, PROFILE_FOLDER
from megatron_eve.train import configure

from ..process import Command, run_command
from .launch import Window

_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)  # as in slurm/env.sh


def run_here(
    recipe: str, *, window: Window, out: Path, overrides: Sequence[str], overwrite: bool
) -> Path:
    """Run to one step behind the window. Returns the folder of the captures.

    Raises: ConfigError for a recipe, override or folder that does not fit; CommandFailed with the run's last lines.
    """
    fields = [
        f"run_dir={out}",
        "train.epochs=none",
        f"train.steps={window.last_step + 1}",
        *overrides,
    ]
    config = configure(recipe, overrides=[*fields, *window.overrides(tool="kineto")])
    if out.exists():
        if not overwrite:
            raise ConfigError(
                f"{out} exists; add --overwrite to delete it or choose another --out."
            )
        if not (out / CONFIG).exists():
            raise ConfigError(f"{out} holds no {CONFIG}, so no run; choose another --out.")
        shutil.rmtree(out)
    run_command(
        _command(recipe, fields, window=window, processes=config.parallel.world_size, out=out)
    )
    return out / PROFILE_FOLDER


def _command(
    recipe: str, fields: Sequence[str], *, window: Window, processes: int, out: Path
) -> Command:
    steps = f"{window.first_step}-{window.last_step}@{','.join(map(str, window.ranks))}"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
    return Command(
        arguments=(
            *launcher,
            *("--nproc-per-node", str(processes)),
            *("-m", "megatron_eve.tools.profile", "exec", "--steps", steps, "--"),
            *(sys.executable, "-m", "megatron_eve.train", recipe, *fields),
        ),
        log=out.with_name(f"{out.name}.log"),
        env=_ONE_THREAD,
    )
