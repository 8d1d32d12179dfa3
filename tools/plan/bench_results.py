# SPDX-License-Identifier: Apache-2.0
"""Measured steps from the result files of our benchmarks, to calibrate on: `step` (our steps, with optimizer) and `gpu`
(its part `full`: forward and backward of the whole model, without).

The files name sizes; the configurations behind them are made again by the benchmarks' own functions."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eve.errors import ConfigError

from .calibration import MeasuredRun
from .mix import Mix

_LABELLED = {"plain": 1.0, "qwen2": 0.5}
"""Share of a sample's text that tools/bench/samples.py labels, by template."""


def runs_of_benchmark(path: Path) -> list[MeasuredRun]:
    """One for each case that was measured.

    Raises: ConfigError if the file is no result of a benchmark that measures whole steps, or holds none.
    """
    readers = {"step": _of_step, "gpu": _of_gpu}
    try:
        result = json.loads(path.read_text())
        name = result["benchmark"]
        runs = list(readers[name](result)) if name in readers else []
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: results of benchmarks are read in a checkout alone, where the benchmarks are ({error})."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no result of a benchmark ({type(error).__name__}: {error})."
        ) from error
    if not runs:
        raise ConfigError(
            f"{path} holds no measured step: found benchmark {name}, expected {' or '.join(readers)} with its rows."
        )
    return runs


def _of_step(result: dict[str, Any]) -> Iterator[MeasuredRun]:
    from ..bench.setting import Scale, scaled_config

    settings = result["settings"]
    scale = Scale(
        hidden_size=settings["hidden"],
        num_layers=settings["layers"],
        token_share=settings["token_share"],
    )
    for row in result["rows"]:
        config = scaled_config(row["stage"], scale=scale, dtype=settings["dtype"])
        train = replace(config.train, recompute=row["our_recompute"])
        useful = sum(row["useful_tokens_per_step"]) / row["samples"]
        vision = useful * row["vision_fraction"]
        yield MeasuredRun(
            name=f"step, stage {row['stage']}",
            config=replace(config, train=train),
            mix=Mix(
                vision=vision,
                text=useful - vision,
                labels=(useful - vision) * _LABELLED[config.data.template],
                fill=row["pack_fill"],
            ),
            micro_batches=max(1, settings["step_tokens"] // row["pack_tokens"]),
            step_s=statistics.median(row["seconds"]["ours"]["wall"]),
        )


def _of_gpu(result: dict[str, Any]) -> Iterator[MeasuredRun]:
    from ..bench.gpu_setting import SETTINGS

    setting = SETTINGS[result["settings"]["size"]]
    if result["settings"]["backend"]:
        setting = replace(setting, backend=result["settings"]["backend"])
    for row in result["parts"].get("full", {"rows": []})["rows"]:
        if "median_step_s" not in row:  # skipped, or it failed
            continue
        yield MeasuredRun(
            name=f"gpu, {row['case']}",
            config=setting.config(row["stage"], pack_tokens=row["pack_tokens"]),
            mix=Mix(
                vision=row["vision_tokens"] / row["samples"],
                text=row["text_tokens"] / row["samples"],
                labels=row["label_tokens"] / row["samples"],
                fill=row["fill"],
            ),
            micro_batches=1,
            step_s=row["median_step_without_waiting_s"],
            with_optimizer=False,
        )
