# SPDX-License-Identifier: Apache-2.0
"""From a configuration to what a training step works on, in the one order that is right: weights before low precision
copies them, freezing before gradient buffers are made for what trains, and the loss's scale, which megatron-core's
schedules look for, from the optimizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig

from megatron_eve.checkpoint.training_state import TrainingState
from megatron_eve.config.schema import RunConfig
from megatron_eve.model.build import build_model
from megatron_eve.model.eve_model import EveModel
from megatron_eve.model.stages import freeze
from megatron_eve.optim.build import build_optimizer, build_schedule
from megatron_eve.parallel.groups import ParallelState
from megatron_eve.training.wrap import wrap_for_training

Prepare = Callable[[Sequence[EveModel]], object]
"""What is done to the bare chunks before anything is made of their weights: loading them, for example."""


@dataclass(frozen=True, slots=True)
class WrappedModel:
    """A model that gradients can be computed of."""

    chunks: Sequence[EveModel]
    wrapped: Sequence[DistributedDataParallel]
    core: TransformerConfig  # shared by all of them; the schedules read their callbacks from it


def build_wrapped_model(
    config: RunConfig, *, state: ParallelState, prepare: Prepare | None = None
) -> WrappedModel:
    """Model and gradient buffers, without an optimizer."""
    chunks, core = build_model(config, state=state)
    if prepare is not None:
        prepare(chunks)
    freeze(chunks, trainable=config.stage.trainable)
    wrapped = wrap_for_training(chunks, config=core, parallel=config.parallel, state=state)
    return WrappedModel(chunks, wrapped, core)


def build_training(
    config: RunConfig, *, state: ParallelState, steps: int, prepare: Prepare | None = None
) -> TrainingState:
    """All that a step changes: model, optimizer and a schedule of `steps` steps."""
    model = build_wrapped_model(config, state=state, prepare=prepare)
    optimizer = build_optimizer(model.wrapped, config=config, state=state)
    model.core.grad_scale_func = optimizer.scale_loss
    schedule = build_schedule(optimizer, config=config, steps=steps)
    return TrainingState(model.chunks, model.wrapped, optimizer, schedule)
