# SPDX-License-Identifier: Apache-2.0
"""Training steps with and without a capture, inside gloo workers."""

from pathlib import Path
from typing import Any

import torch

from megatron_eve.config.schema import RunConfig
from megatron_eve.metrics.profiling import Capture
from megatron_eve.training.step import train_step
from tests.support.tiny import naive_pack, random_samples
from tests.support.train_once import ALIGN, TOKENS, build_all


def steps(config: RunConfig, *, run_dir: str, count: int) -> dict[str, Any]:
    """`count` steps of two micro-batches as the trainer takes them, then what is left on the modules.

    Returns losses, gradient norms, weights' sums, and the number of hooks and timers after each step."""
    training, state = build_all(config, weights=None, steps=count)
    chunks, wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    capture = Capture(
        config, run_dir=Path(run_dir), state=state, model=wrapped, optimizer=optimizer
    )
    packs = [
        naive_pack(random_samples(5, seed=seed), model=config.model, tokens=TOKENS, align=ALIGN)
        for seed in (1, 2)
    ]
    seen: dict[str, Any] = {"loss": [], "grad_norm": [], "hooks": []}
    for number in range(1, count + 1):
        with capture.step(number):
            result = train_step(
                wrapped,
                packs,
                optimizer=optimizer,
                schedule=schedule,
                config=config,
                state=state,
                stop_requested=False,
                ranges=capture.range,
            )
        capture.done(number, result.metrics | {"step_time_s": 1.0, "data_wait_s": 0.0})
        seen["loss"].append(result.metrics["loss"])
        seen["grad_norm"].append(result.metrics["grad_norm"])
        seen["hooks"].append(_hooks(chunks) + (wrapped[0].config.timers is not None))
    capture.close()
    seen["weights"] = [float(p.detach().double().sum()) for c in chunks for p in c.parameters()]
    return seen


def _hooks(chunks: list[torch.nn.Module]) -> int:
    modules = [module for chunk in chunks for module in chunk.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def nsys_without_cuda(config: RunConfig, *, run_dir: str) -> str:
    """The refusal."""
    from megatron_eve.errors import ConfigError

    training, state = build_all(config, weights=None)
    wrapped, optimizer = training.wrapped, training.optimizer
    try:
        Capture(config, run_dir=Path(run_dir), state=state, model=wrapped, optimizer=optimizer)
    except ConfigError as error:
        return str(error)
    return "accepted"
