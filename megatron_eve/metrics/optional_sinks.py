# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: imported only when the configuration asks for one, each package only by its sink.

Both continue one run over restarts. TensorBoard purges the steps that a resumed run repeats. W&B keeps the first record
of a repeated step; its run id lies in the run folder (`wandb_run_id.txt`). W&B runs as WANDB_MODE says; without that
variable online where WANDB_API_KEY is set, else offline, to be sent later with `wandb sync`."""

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import flatten
from megatron_eve.errors import ConfigError
from megatron_eve.whole import write_text

RUN_ID_FILE = "wandb_run_id.txt"


class TensorBoardSink:
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, *, run_dir: Path, start_step: int) -> None:
        module = _import(
            "torch.utils.tensorboard", package="tensorboard", key="logging.tensorboard"
        )
        self._writer = module.SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per run folder."""

    def __init__(self, config: RunConfig, *, run_dir: Path) -> None:
        wandb = _import("wandb", package="wandb", key="logging.wandb")
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=run_dir.name,
            id=_run_id(run_dir / RUN_ID_FILE),
            resume="allow",
            dir=run_dir,
            mode=_wandb_mode(),
            config=flatten(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )


def _run_id(path: Path) -> str:
    """The id of this run folder, made at the first start."""
    known = path.read_text().strip() if path.exists() else ""
    if known:
        return known
    run_id = secrets.token_hex(8)
    write_text(path, f"{run_id}\n")
    return run_id


def _import(module: str, *, package: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}=true needs the package {package}, which is not installed; run "
            f"`pip install {package}` or set {key}=false."
        ) from error
