# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: forward and backward of all micro-batches by megatron-core's schedule, then the update."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_eve.config.schema import RunConfig, TrainableGroup
from megatron_eve.data.loader import FAULTS
from megatron_eve.data.sample import Pack
from megatron_eve.metrics.flops import executed_flops, ideal_flops
from megatron_eve.metrics.profiling import no_range
from megatron_eve.model.micro_batch import MicroBatch, RankPlace, micro_batch, stream_rows
from megatron_eve.optim.build import update_weights
from megatron_eve.parallel.groups import ParallelState
from megatron_eve.training.learning import GROUPS, reached_groups
from megatron_eve.training.loss import label_weights, micro_batch_loss
from megatron_eve.training.non_finite import NonFiniteLossError, origin_of_non_finite

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; the same on every process."""

    metrics: dict[str, float]  # by names of metrics/definitions.py
    reached: tuple[TrainableGroup, ...]  # groups whose gradient is not zero
    stop_requested: bool


COUNTS = (
    "label_tokens",
    "computed_tokens",
    "vision_tokens",
    "text_tokens",
    "samples",
    "quarantined",
    *FAULTS,
    "samples_checksum",
    "ideal_flops",
    "executed_flops",
)


def rank_micro_batches(
    packs: Sequence[Pack], *, config: RunConfig, state: ParallelState
) -> list[MicroBatch]:
    """This rank's part of each micro-batch, with the weight of each of its labels in the step's loss."""
    weights = label_weights(packs, optim=config.optim, group=state.groups.dp, device=state.device)
    parallel = config.parallel
    place = RankPlace(
        tp_rank=state.tp_rank,
        tp_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        cp_rank=state.cp_rank,
        cp_size=parallel.context,
    )
    return [
        micro_batch(
            pack,
            place=place,
            split_attention=config.model.split.attention,
            align=config.data.align,
            device=state.device,
            label_weights=of_pack,
        )
        for pack, of_pack in zip(packs, weights, strict=True)
    ]


def forward_backward(
    model: Sequence[DistributedDataParallel],
    packs: Sequence[Pack],
    *,
    config: RunConfig,
    state: ParallelState,
) -> list[Tensor]:
    """Accumulate the gradients of one global batch. Returns each micro-batch's logged [2] sums on the last stage."""
    batches = rank_micro_batches(packs, config=config, state=state)
    for chunk in model:
        chunk.zero_grad_buffer()
    iterators = [
        iter(batches) for _ in model
    ]  # every chunk of an interleaved schedule walks the same micro-batches
    cp_size = config.parallel.context
    rows = stream_rows(config.data.pack_tokens, cp_size=cp_size, align=config.data.align)
    run_schedule = get_forward_backward_func()
    return run_schedule(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        seq_length=rows * cp_size,  # the schedules divide it again
        micro_batch_size=1,
        forward_only=False,
    )


def _forward_step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    batch = next(batches)

    def loss_func(row_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = micro_batch_loss(row_losses, batch=batch)
        return loss.numerator, loss.denominator, loss.logged

    return chunk(batch), loss_func


def train_step(
    model: Sequence[DistributedDataParallel],
    packs: Sequence[Pack],
    *,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    config: RunConfig,
    state: ParallelState,
    stop_requested: bool,
    faults: Mapping[str, int] | None = None,
    ranges: Callable[[str], AbstractContextManager[None]] = no_range,
) -> StepResult:
    """One update. `stop_requested` on any process is true in the result of every process. `ranges` marks the part of
    the step with that name for a profiler. `faults`: what this process's loader met since the step before, by FAULTS.

    Raises: NonFiniteLossError before the weights are touched, unless train.on_non_finite=skip: then the step's metric
    `skipped` is 1, and the schedule goes on.
    """
    optimizer.zero_grad()
    logged = forward_backward(model, packs, config=config, state=state)
    reached = reached_groups(model, device=state.device)
    measured = _reduce(
        logged,
        packs,
        reached,
        config=config,
        state=state,
        stop_requested=stop_requested,
        faults=faults or {},
    )
    rates = _learning_rates(optimizer)
    with ranges("optimizer"):
        grad_norm, problem = _update(optimizer, loss=measured.metrics["loss"], packs=packs)
    if problem is not None:
        origin = origin_of_non_finite(
            model,
            lambda: forward_backward(model, packs, config=config, state=state),
            pipeline_rank=state.pp_rank,
        )
        problem = f"{problem}. First seen in: {origin}"
        if config.train.on_non_finite == "stop":
            raise NonFiniteLossError(problem)
        _LOG.warning("skipped a step: %s", problem)
    schedule.step(increment=1)
    skipped = {"grad_norm": grad_norm, "skipped": float(problem is not None)}
    return replace(measured, metrics=measured.metrics | rates | skipped)


def _update(
    optimizer: MegatronOptimizer, *, loss: float, packs: Sequence[Pack]
) -> tuple[float, str | None]:
    """The gradient's norm, and why the weights were left alone or None."""
    problem = _non_finite_loss(loss, packs)
    if problem is not None:
        return math.nan, problem
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    problem = _non_finite_gradient(grad_norm)
    if problem is None:
        update_weights(optimizer, grad_norm=grad_norm)
    return grad_norm, problem


def _non_finite_loss(loss: float, packs: Sequence[Pack]) -> str | None:
    if math.isfinite(loss):
        return None
    names = ", ".join(name for pack in packs for name in pack.sample_ids[:4])
    return (
        f"loss is {loss}; the weights were not updated. First samples of this rank's "
        f"packs: {names}. Lower optim.peak_lr, set optim.clip_grad, or look at these samples "
        "with `megatron-eve data inspect`"
    )


def _non_finite_gradient(norm: float) -> str | None:
    """The norm is reduced over the model, so that every process decides the same. Without a loss scale megatron-core
    itself would update the weights with such a gradient."""
    if math.isfinite(norm):
        return None
    return (
        f"the gradient norm is {norm} although the loss is finite; the weights were not updated. "
        "Lower optim.peak_lr or set optim.clip_grad"
    )


def _learning_rates(optimizer: MegatronOptimizer) -> dict[str, float]:
    """Learning rates of the decoder and of the patch embedding, whichever are trained."""
    groups = optimizer.param_groups
    decoder = [g["lr"] for g in groups if g["default_config"]]
    patch = [g["lr"] for g in groups if not g["default_config"]]
    rates = {"lr": float((decoder or patch)[0])}
    return rates | ({"patch_embedding_lr": float(patch[0])} if patch else {})


def _reduce(
    logged: Sequence[Tensor],
    packs: Sequence[Pack],
    reached: Tensor,
    *,
    config: RunConfig,
    state: ParallelState,
    stop_requested: bool,
    faults: Mapping[str, int],
) -> StepResult:
    """Sums over all processes, each quantity counted once: the loss on the last stage, the packs on the data leader.
    A group is reached if it is on any process."""
    sums = torch.zeros(3 + len(COUNTS) + len(reached), dtype=torch.float64, device=state.device)
    sums[0] = float(stop_requested)
    if logged and state.is_last_stage and state.tp_rank == 0:
        sums[1:3] = torch.stack(list(logged)).sum(0)
    if state.is_data_leader:
        counts = _counts(packs, config=config) | {name: faults.get(name, 0) for name in FAULTS}
        sums[3 : 3 + len(COUNTS)] = torch.tensor(
            [counts[name] for name in COUNTS], dtype=torch.float64
        )
    sums[3 + len(COUNTS) :] = reached
    torch.distributed.all_reduce(sums)
    stops, numerator, denominator, *others = sums.tolist()
    counted = dict(zip(COUNTS, others[: len(COUNTS)], strict=True))
    on_ranks = zip(GROUPS, others[len(COUNTS) :], strict=True)
    return StepResult(
        metrics={"loss": numerator / max(denominator, 1.0), **counted},
        reached=tuple(group for group, ranks in on_ranks if ranks),
        stop_requested=stops > 0,
    )


def _counts(packs: Sequence[Pack], *, config: RunConfig) -> dict[str, float]:
    model, trainable = config.model, config.stage.trainable
    return {
        "label_tokens": sum(pack.label_targets.numel() for pack in packs),
        "computed_tokens": sum(pack.num_tokens for pack in packs),
        "vision_tokens": sum(pack.num_real_vision for pack in packs),
        "text_tokens": sum(pack.num_real_text for pack in packs),
        "samples": sum(len(pack.sample_ids) for pack in packs),
        "quarantined": sum(len(pack.quarantined) for pack in packs),
        "samples_checksum": sum(_checksum(pack.sample_ids) for pack in packs),
        "ideal_flops": sum(ideal_flops(pack, model=model, trainable=trainable) for pack in packs),
        "executed_flops": sum(executed_flops(pack, config=config) for pack in packs),
    }


def _checksum(sample_ids: Sequence[str]) -> int:
    """40 bits, so that a sum over up to 8,192 packs is exact in float64."""
    return xxhash.xxh3_64_intdigest("\0".join(sample_ids).encode()) >> 24
