# SPDX-License-Identifier: Apache-2.0
"""Constants of the time model from measured runs: their config.txt and metrics.jsonl, or a benchmark's result
(bench_results.py).

A run's step is a sum of amounts over rates (timing.py), so the inverses of the rates are found by least squares on the
relative errors of the runs' median steps, none below zero, with a light pull to what was assumed: one run gives little
more than one number, and a constant on which no run depends keeps its assumption. Runs that differ in width, depth,
pack and processes separate the constants.

Time spent waiting for data is not part of the step here. Step times do not show overlap; it is assumed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import config_from_text
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import CONFIG, METRICS_FILE

from .cluster import Cluster, Gpu
from .mix import Mix
from .rates import Rates
from .timing import StepTime, amounts, step_time

_SKIPPED = 1 / 3  # of a run's records: caches, allocator
_PULL = 1e-3  # weight of the assumption beside a run
_ROUNDS = 20_000

CPU = Gpu(
    name="CPU",
    device_name="",
    memory=0,
    memory_bytes_per_s=5e9,
    nvlink_bytes_per_s=1e9,
)
"""A core of a laptop, as a device: where a fit starts when runs have no GPU."""

CPU_RATES = Rates(
    gemm_flops_per_s=3e10,
    attention_flops_per_s=1e10,
    memory_bytes_per_s=5e9,
    optimizer_bytes_per_s=2e9,
    gemm_overhead_s=2e-5,
    layer_overhead_s=2e-3,
    step_overhead_s=1e-2,
    link_share=1.0,
    compute_overlaps=False,
)

_INVERSES = (
    "gemm_flops_per_s",
    "attention_flops_per_s",
    "memory_bytes_per_s",
    "optimizer_bytes_per_s",
    "gemm_overhead_s",
    "layer_overhead_s",
    "step_overhead_s",
    "link_share",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    """One run: its configuration, what its average pack held, and its median step."""

    name: str
    config: RunConfig
    mix: Mix
    micro_batches: int
    step_s: float
    with_optimizer: bool = True  # whether step_s holds the optimizer's part


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A measured run beside the model."""

    run: MeasuredRun
    time: StepTime

    @property
    def error(self) -> float:
        """Error of the model, relative to the measured step."""
        return self.time.total / self.run.step_s - 1


def read_run(run_dir: Path) -> MeasuredRun:
    """Raises: ConfigError if the folder holds no finished record of a run."""
    try:
        config = config_from_text((run_dir / CONFIG).read_text())
        records = read_metrics(run_dir / METRICS_FILE)
    except OSError as error:
        raise ConfigError(f"{run_dir} is no run folder: {error}") from error
    records = records[int(len(records) * _SKIPPED) :]
    if not records:
        raise ConfigError(f"{run_dir / METRICS_FILE} holds no record; wait for logged steps.")

    def mean(name: str) -> float:
        return statistics.fmean(float(record[name] or 0) for record in records)

    samples = mean("samples")
    useful = mean("vision_tokens") + mean("text_tokens")
    packs = mean("computed_tokens") / config.data.pack_tokens
    return MeasuredRun(
        name=run_dir.name,
        config=config,
        mix=Mix(
            vision=mean("vision_tokens") / samples,
            text=mean("text_tokens") / samples,
            labels=mean("label_tokens") / samples,
            fill=useful / mean("computed_tokens"),
        ),
        micro_batches=max(1, round(packs / config.parallel.data)),
        step_s=statistics.median(
            float(record["step_time_s"] or 0) - float(record["data_wait_s"] or 0)
            for record in records
        ),
    )


def predict(run: MeasuredRun, *, rates: Rates, gpu: Gpu) -> StepTime:
    """The model's prediction for a measured run."""
    parallel = run.config.parallel
    cluster = Cluster(
        num_nodes=parallel.num_nodes,
        gpus_per_node=parallel.gpus_per_node,
        gpu=gpu,
        network_bytes_per_s=gpu.nvlink_bytes_per_s,
    )
    done = replace(amounts(run.config, run.mix), micro_batches=run.micro_batches)
    if not run.with_optimizer:
        done = replace(done, optimizer_bytes=0.0)
    return step_time(run.config, done, rates=rates, cluster=cluster)


def fit(runs: Sequence[MeasuredRun], *, start: Rates, gpu: Gpu) -> Rates:
    """The rates that the runs show. Raises: ConfigError without a run."""
    if not runs:
        raise ConfigError("name at least one run folder to calibrate on.")
    measured = np.array([run.step_s for run in runs])
    columns = [
        [predict(run, rates=_only(start, name), gpu=gpu).total for run in runs]
        for name in _INVERSES
    ]
    # Relative to the measured steps; a factor of 1 leaves a constant as assumed.
    shares = np.array(columns).T / measured[:, None]
    factors = _non_negative_fit(shares, np.ones(len(runs)))
    return _scaled(start, dict(zip(_INVERSES, factors.tolist(), strict=True)))


def _only(start: Rates, name: str) -> Rates:
    """Rates with which nothing but the part that `name` governs takes time."""
    free = dict.fromkeys(_INVERSES, 0.0) | {name: 1.0}
    return _scaled(start, free)


def _scaled(start: Rates, factors: dict[str, float]) -> Rates:
    """Each constant's time multiplied by its factor; a factor of 0 makes its part free."""

    def scaled(name: str) -> float:
        before, factor = float(getattr(start, name)), factors[name]
        if name.endswith("_overhead_s"):
            return before * factor
        return before / factor if factor else math.inf

    constants: dict[str, Any] = {name: scaled(name) for name in _INVERSES}
    return replace(start, **constants)


def _non_negative_fit(
    shares: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Factors >= 0 that minimise |shares x - target|^2 + pull |x - 1|^2, by coordinate descent; convex, one minimum."""
    normal = shares.T @ shares + _PULL * np.eye(shares.shape[1])
    right = shares.T @ target + _PULL
    x = np.ones(shares.shape[1])
    for _ in range(_ROUNDS):
        before = x.copy()
        for i in range(x.size):
            x[i] = max(0.0, x[i] + (right[i] - normal[i] @ x) / normal[i, i])
        if np.abs(x - before).max() < 1e-12:
            break
    return x
