# SPDX-License-Identifier: Apache-2.0
"""Every layout of a recipe on a cluster: does it fit, how long is a step, how long the stage."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_eve.config.layout_checks import divisors
from megatron_eve.config.resolve import resolve
from megatron_eve.config.schema import ParallelConfig, RunConfig
from megatron_eve.config.sizes import EpochSize, total_steps
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.flops import matrix_products

from .cluster import Cluster
from .memory import Memory, memory
from .mix import Mix, needed_work_of, pack_rows, samples_per_pack
from .rates import Rates
from .timing import StepTime, amounts, micro_batches, step_time

RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
SAMPLES = {  # of the paper's data (docs/planning.md)
    "eve7b_stage1": 10_000_000,
    "eve7b_stage2_1_ld": 29_000_000,
    "eve7b_stage2_1_hd": 48_000_000,
    "eve7b_stage2_2": 15_000_000,
    "eve7b_stage3": 7_300_000,
}
_DAY = 86400.0
_MAX_CONTEXT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One layout and its results."""

    config: RunConfig
    memory: Memory
    time: StepTime
    micro_batches: int
    filled: float  # of the packs that a step computes, those that hold samples
    tokens_per_s: float  # useful, of all GPUs
    mfu: float
    days: float | None  # None where the number of steps is not known

    @property
    def name(self) -> str:
        """Short, e.g. `TP4 PP2x2 CP1 DP16 full`."""
        p = self.config.parallel
        virtual = f"x{p.virtual_pipeline}" if p.virtual_pipeline > 1 else ""
        recompute = self.config.train.recompute
        return f"TP{p.tensor} PP{p.pipeline}{virtual} CP{p.context} DP{p.data} {recompute}"


def candidates(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """Every layout that the configuration's own checks let pass. Tensor parallelism stays inside a node."""
    model = config.model
    for tensor, pipeline, context in itertools.product(
        divisors(model.num_kv_heads, model.num_attention_heads),
        divisors(model.num_layers),
        range(1, _MAX_CONTEXT + 1),
    ):
        ranks = tensor * pipeline * context
        if tensor > cluster.gpus_per_node or cluster.num_gpus % ranks:
            continue
        virtuals = (1, 2) if pipeline > 1 and not model.num_layers % (2 * pipeline) else (1,)
        for virtual, recompute in itertools.product(virtuals, RECOMPUTE):
            parallel = _layout(config.parallel, cluster, tensor, pipeline, virtual, context)
            aligned = config.data.sample_align if context == 1 else 2 * context
            made = replace(
                config,
                parallel=parallel,
                data=replace(config.data, sample_align=aligned),
                train=replace(config.train, recompute=recompute),
            )
            try:
                yield resolve(made)
            except ConfigError:
                continue


def own_layout(config: RunConfig, cluster: Cluster) -> RunConfig | None:
    """The recipe's configuration, if it is made for as many GPUs and passes its checks."""
    parallel = config.parallel
    if (parallel.num_nodes, parallel.gpus_per_node) != (cluster.num_nodes, cluster.gpus_per_node):
        return None
    try:
        return resolve(config)
    except ConfigError:
        return None


def _layout(
    base: ParallelConfig, cluster: Cluster, tensor: int, pipeline: int, virtual: int, context: int
) -> ParallelConfig:
    data = cluster.num_gpus // (tensor * pipeline * context)
    sharded = data * context > 1
    return replace(
        base,
        num_nodes=cluster.num_nodes,
        gpus_per_node=cluster.gpus_per_node,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        sequence_parallel=tensor > 1,
        distributed_optimizer=sharded,
        overlap_grad_reduce=sharded,
        overlap_param_gather=sharded,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all layouts of a plan share."""

    mix: Mix
    cluster: Cluster
    rates: Rates
    workspace: float  # bytes
    num_samples: int | None  # of the stage; None where not known


def plan(config: RunConfig, setting: Setting) -> Plan:
    """The results of one layout."""
    mix, cluster = setting.mix, setting.cluster
    rows = pack_rows(config, mix)
    time = step_time(config, amounts(config, mix), rates=setting.rates, cluster=cluster)
    packs = float(config.batch.size)
    if config.batch.unit == "samples":
        packs = config.batch.size / samples_per_pack(config, mix)
    done = micro_batches(config, mix)
    work = matrix_products(
        config.model, needed_work_of(config, mix), trainable=config.stage.trainable
    )
    flops = packs * sum(one.total for one in work.values())
    steps = total_steps(config, epoch=_epoch(config, setting))
    return Plan(
        config=config,
        memory=memory(config, rows, workspace=setting.workspace),
        time=time,
        micro_batches=done,
        filled=packs / (done * config.parallel.data),
        tokens_per_s=packs * mix.fill * config.data.pack_tokens / time.total,
        mfu=flops / time.total / cluster.num_gpus / cluster.gpu.peak_flops,
        days=steps * time.total / _DAY if steps is not None else None,
    )


def _epoch(config: RunConfig, setting: Setting) -> EpochSize | None:
    if setting.num_samples is None:
        return None
    mix = setting.mix
    tokens = config.data.pack_tokens * mix.fill / samples_per_pack(config, mix)
    return EpochSize(samples=setting.num_samples, tokens=round(setting.num_samples * tokens))


def plans(config: RunConfig, setting: Setting) -> tuple[list[Plan], list[Plan]]:
    """(those that fit, fastest first; those that do not, least missing first).

    Raises: ConfigError if not one layout passes the checks, or none fits: what is missing, and where it goes."""
    cluster = setting.cluster
    found = [plan(candidate, setting) for candidate in candidates(config, cluster)]
    if not found:
        raise ConfigError(
            f"no layout of {config.recipe} divides {cluster}: {cluster.num_gpus} GPUs, {config.model.num_layers} "
            f"layers, {config.model.num_kv_heads} key/value heads, {config.batch.size} {config.batch.unit} a step."
        )
    fits = [one for one in found if one.memory.total <= cluster.gpu.memory]
    others = [one for one in found if one.memory.total > cluster.gpu.memory]
    fits.sort(key=lambda one: one.time.total)
    others.sort(key=lambda one: one.memory.total)
    if not fits:
        raise ConfigError(_nothing_fits(config, others[0], cluster))
    return fits, others


def _nothing_fits(config: RunConfig, nearest: Plan, cluster: Cluster) -> str:
    held = nearest.memory
    missing = held.total - cluster.gpu.memory
    parts = ", ".join(
        f"{name} {getattr(held, name) / 1e9:.1f}"
        for name in ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
    )
    return (
        f"nothing of {config.recipe} fits {cluster}: the nearest, {nearest.name}, needs {held.total / 1e9:.1f} of "
        f"{cluster.gpu.memory / 1e9:.0f} GB, {missing / 1e9:.1f} GB too much ({parts}); use more or larger GPUs, or a "
        f"smaller data.pack_tokens than {config.data.pack_tokens:,}."
    )
