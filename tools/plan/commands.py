# SPDX-License-Identifier: Apache-2.0
"""The work of `python -m tools.plan` once its command line is read: the plan of a recipe, and the calibration."""

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import ConfigError

from .bench_results import runs_of_benchmark
from .calibration import (
    CPU,
    CPU_RATES,
    Fitted,
    MeasuredRun,
    fit,
    predict,
    read_run,
)
from .cluster import GPUS, parse_cluster
from .layouts import SAMPLES, Plan, Setting, own_layout, plan, plans
from .mix import assumed_mix, parse_mix
from .rates import assumed, read_calibration, write_calibration
from .render import fitted_table, heading, layouts_table, memory_table, time_table


def show_plan(options: argparse.Namespace) -> int:
    cluster = parse_cluster(
        options.cluster, nvlink_gbs=options.nvlink_gbs, network_gbs=options.network_gbs
    )
    config = _configured(options.recipe, options.overrides)
    mix = parse_mix(options.mix) if options.mix else assumed_mix(config)
    path: Path | None = options.calibration
    setting = Setting(
        mix=mix,
        cluster=cluster,
        rates=read_calibration(path) if path else assumed(cluster.gpu),
        workspace=options.workspace_gb * 1e9,
        num_samples=options.samples or SAMPLES.get(config.recipe),
    )
    fits, others = plans(config, setting)
    if options.json:
        print(json.dumps([_as_json(one) for one in fits], indent=1))
        return 0
    constants = f"{path}" if path else "assumed from data sheets, compared with no GPU"
    shown = fits[: options.show]
    print(heading(fits[0], cluster=cluster, mix=mix, constants=constants))
    print(f"\nlayouts that fit: {len(fits)} of {len(fits) + len(others)}, fastest first\n")
    print(layouts_table(shown))
    print("\nmemory of the fullest rank\n")
    print(memory_table(shown, cluster=cluster))
    print("\na step by part\n")
    print(time_table(shown))
    if (own := own_layout(config, cluster)) is not None:
        print("\nthe recipe's own layout\n")
        print(layouts_table([plan(own, setting)]) + "\n")
        print(memory_table([plan(own, setting)], cluster=cluster))
    if others:
        print("\nnearest that do not fit\n")
        print(memory_table(others[: options.show], cluster=cluster))
    return 0


def _configured(recipe: str, overrides: Sequence[str]) -> RunConfig:
    """Without resolve(): the recipe's own layout need not fit the cluster; each candidate is checked."""
    return apply_overrides(load_recipe(recipe), overrides)


def _as_json(one: Plan) -> dict[str, Any]:
    parallel = one.config.parallel
    return {
        "layout": one.name,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": parallel.data,
        "recompute": one.config.train.recompute,
        "memory": asdict(one.memory) | {"total": one.memory.total},
        "time": asdict(one.time) | {"total": one.time.total},
        "micro_batches": one.micro_batches,
        "filled": one.filled,
        "tokens_per_s": one.tokens_per_s,
        "mfu": one.mfu,
        "days": one.days,
        "limit": one.time.limit,
    }


def calibrate(options: argparse.Namespace) -> int:
    if options.gpu is not None and options.gpu not in GPUS:
        raise ConfigError(f"--gpu {options.gpu}: there are {', '.join(GPUS)}.")
    if options.out is not None and options.out.exists() and not options.overwrite:
        raise ConfigError(f"{options.out} exists; add --overwrite to replace it.")
    gpu = GPUS[options.gpu] if options.gpu else CPU
    start = assumed(gpu) if options.gpu else CPU_RATES
    runs = _measured(options.runs)
    rates = fit(runs, start=start, gpu=gpu)
    fitted = [Fitted(run=run, time=predict(run, rates=rates, gpu=gpu)) for run in runs]
    print("fitted\n\n" + fitted_table(fitted))
    foretold = [
        Fitted(run=run, time=predict(run, rates=rates, gpu=gpu)) for run in _measured(options.check)
    ]
    if foretold:
        print("\npredicted\n\n" + fitted_table(foretold))
    if options.out is not None:
        facts = {
            "gpu": gpu.name,
            "date": datetime.date.today().isoformat(),
            "fitted": [_error(one) for one in fitted],
            "predicted": [_error(one) for one in foretold],
        }
        write_calibration(options.out, rates=rates, facts=facts)
        print(f"\nwrote {options.out}")
    worst = max((abs(one.error) for one in foretold), default=0.0)
    if worst > options.within / 100:
        print(
            f"a prediction is off by {100 * worst:.1f}%, more than {options.within:g}%",
            file=sys.stderr,
        )
        return 1
    return 0


def _measured(paths: Sequence[Path]) -> list[MeasuredRun]:
    """A folder is a run, a file the result of a benchmark."""
    return [
        run
        for path in paths
        for run in (runs_of_benchmark(path) if path.is_file() else [read_run(path)])
    ]


def _error(one: Fitted) -> dict[str, Any]:
    return {"run": one.run.name, "measured_s": one.run.step_s, "model_s": one.time.total}
