# SPDX-License-Identifier: Apache-2.0
"""The two contenders of the step benchmark, with equal weights: the trainer's own step, and the official form's."""

from collections.abc import Sequence

import torch

from checkpoints_convert.tensors import eve_to_hf
from megatron_eve.config.schema import RunConfig
from megatron_eve.data.sample import Pack
from megatron_eve.model.eve_model import EveModel
from megatron_eve.optim.adam import FusedAdam
from megatron_eve.parallel.groups import ParallelState
from megatron_eve.training.assemble import build_training
from megatron_eve.training.step import train_step
from tools.bench.official_form import OfficialForm, PaddedBatch, freeze_official

_SCHEDULE_STEPS = 1000


class OurStep:
    """EveModel through megatron-core's schedule, gradient buffers and optimizer: what the trainer runs."""

    def __init__(self, config: RunConfig, *, state: ParallelState) -> None:
        self._config, self._state = config, state
        self.training = build_training(config, state=state, steps=_SCHEDULE_STEPS)

    @property
    def model(self) -> EveModel:
        """The bare model."""
        return self.training.chunks[0]

    def step(self, packs: Sequence[Pack]) -> float:
        """One update; the loss per target."""
        result = train_step(
            self.training.wrapped,
            packs,
            optimizer=self.training.optimizer,
            schedule=self.training.schedule,
            config=self._config,
            state=self._state,
            stop_requested=False,
        )
        return result.metrics["loss"]


class OfficialStep:
    """The official form with gradient accumulation over padded micro-batches and the same AdamW."""

    def __init__(self, config: RunConfig, *, weights_of: EveModel, recompute: bool) -> None:
        self.form = OfficialForm(config.model, recompute=recompute)
        weights = {name: param.detach() for name, param in weights_of.named_parameters()}
        self.form.load_state_dict(eve_to_hf(weights, config.model))
        self.form.to(next(weights_of.parameters()))
        freeze_official(self.form, trainable=config.stage.trainable)
        trained = [param for param in self.form.parameters() if param.requires_grad]
        optim = config.optim
        self._optimizer = FusedAdam(
            trained,
            lr=optim.peak_lr,
            betas=(optim.adam_beta1, optim.adam_beta2),
            eps=optim.adam_eps,
        )

    def step(self, batches: Sequence[PaddedBatch], *, num_targets: int) -> float:
        """One update; the loss per target."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            loss = self.form(batch) / num_targets
            torch.autograd.backward(loss)
            total += float(loss.detach())
        self._optimizer.step()
        return total
