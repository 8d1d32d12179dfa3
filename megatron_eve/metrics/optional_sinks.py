# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases: imported only when the configuration asks for one, each package only by its sink.

Both continue one run over restarts. TensorBoard purges the steps that a resumed run repeats. W&B keeps the first record
of a repeated step; its run id lies in the run folder (`wandb_run_id.txt`).

W&B follows its own settings (WANDB_MODE, its settings files) and finds a login itself (WANDB_API_KEY, netrc, settings).
Without a login, or if its server does not answer, a start is offline, and one line says so and how to send the records
later. Neither service may end or delay a run: see background.py. Console output is not sent to W&B, because every line
would wait for it."""

import importlib
import logging
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import flatten
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.background import BackgroundSink, told

RUN_ID_FILE = "wandb_run_id.txt"
REACH_S = 20  # for W&B's server to answer at the start of a run
FINISH_S = 30  # for unsent records at its end; they stay on the disk
_LOG = logging.getLogger(__name__)


def optional_sinks(config: RunConfig, *, run_dir: Path, start_step: int) -> list[BackgroundSink]:
    """The sinks that the configuration asks for. Raises: ConfigError if a package is not installed."""
    found = []
    if config.logging.tensorboard:
        module = _import(
            "torch.utils.tensorboard", package="tensorboard", key="logging.tensorboard"
        )
        if module is not None:
            board = partial(TensorBoardSink, module, run_dir=run_dir, start_step=start_step)
            found.append(BackgroundSink("TensorBoard", board, close_s=FINISH_S))
    if config.logging.wandb:
        wandb = _import("wandb", package="wandb", key="logging.wandb")
        if wandb is not None:
            service = partial(WandbSink, wandb, config, run_dir=run_dir)
            found.append(BackgroundSink("W&B", service, close_s=2 * REACH_S + FINISH_S))
    return found


class TensorBoardSink:
    """Event files in `run_dir/tensorboard`."""

    def __init__(self, module: Any, *, run_dir: Path, start_step: int) -> None:
        self._writer = module.SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per run folder."""

    def __init__(self, wandb: Any, config: RunConfig, *, run_dir: Path) -> None:
        self._wandb = wandb
        wandb.setup(wandb.Settings(silent=True))  # our own line comes below
        self._settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=REACH_S,
            finish_timeout=FINISH_S,
            finish_timeout_raises=True,
        )
        self._arguments = dict(
            project=config.logging.wandb_project,
            name=run_dir.name,
            id=_run_id(run_dir / RUN_ID_FILE),
            resume="allow",
            dir=run_dir,
            config=flatten(config),
            settings=self._settings,
        )
        self._run, where = self._start()
        _LOG.info("W&B: %s", where)

    def _start(self) -> tuple[Any, str]:
        """The run, and in words where its records go."""
        wanted = self._wandb.setup().settings.mode or "online"
        if wanted != "online":
            return self._offline(f"{wanted}, as WANDB_MODE or wandb's settings say", mode=wanted)
        try:
            if not self._wandb.login(prompt=False, verify=False):
                return self._offline(
                    "offline, without a login in WANDB_API_KEY, netrc and wandb's settings (`wandb login` makes one)"
                )
            run = self._wandb.init(mode="online", **self._arguments)
            return run, f"online, {run.url}"
        except Exception as error:
            self._wandb.teardown()  # its service still holds the run
            first = told(error).split("; the run")[0]
            return self._offline(f"offline for this start, the server does not take it ({first})")

    def _offline(self, why: str, *, mode: str = "offline") -> tuple[Any, str]:
        run = self._wandb.init(mode=mode, **self._arguments)
        if mode == "disabled":
            return run, why
        return run, f"{why}; send it later: wandb sync {run.settings.sync_dir}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        try:
            self._run.finish()
        except TimeoutError:
            _LOG.warning(
                "W&B: not all records are sent after %d s; send them later: wandb sync %s",
                FINISH_S,
                self._run.settings.sync_dir,
            )


def _run_id(path: Path) -> str:
    """The id of this run folder, made at the first start."""
    known = path.read_text().strip() if path.exists() else ""
    if known:
        return known
    run_id = secrets.token_hex(8)
    path.write_text(f"{run_id}\n")
    return run_id


def _import(module: str, *, package: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key}=true needs the package {package}, which is not installed; run "
            f"`pip install {package}` or set {key}=false."
        ) from error
    except Exception as error:  # installed, and broken
        _LOG.warning("%s cannot be imported: %s", package, told(error))
        return None
