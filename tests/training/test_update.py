# SPDX-License-Identifier: Apache-2.0
"""The update of a step: gradients prepared and their norm taken once, and the weights that megatron-core's own step()
gives, to the last bit."""

from typing import Any

import pytest
import torch

from megatron_eve.config.schema import ParallelConfig
from megatron_eve.training.step import forward_backward
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import build_all, global_batch, packs_of_rank, run_config


def updated(parallel: ParallelConfig, changes: dict[str, Any], own: bool) -> tuple[Any, list[Any]]:
    """Norm and weights after two updates, in a gloo worker; `own`: by the optimizer's step()."""
    from megatron_eve.training import step

    config = run_config(tiny_model(), parallel, **changes)
    training, state = build_all(config, weights=None)
    optimizer, norms = training.optimizer, []
    for first in (0, 2):
        packs = packs_of_rank(global_batch(4)[first : first + 2], config=config, state=state)
        optimizer.zero_grad()
        forward_backward(training.wrapped, packs, config=config, state=state)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        if own:
            _, norm, _ = optimizer.step()
        else:
            norm, problem = step._update(optimizer, loss=1.0, packs=packs)
            assert problem is None
        norms.append(float(norm))
    for chunk in training.wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return norms, [param.detach() for c in training.chunks for param in c.parameters()]


CASES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "clipped": (layout(), {"optim": {"clip_grad": 0.01}}),
    "not clipped": (layout(), {"optim": {"clip_grad": 0.0}}),
    "bf16": (layout(), {"optim": {"clip_grad": 0.01}, "train": {"dtype": "bf16"}}),
    "dp2, sharded": (
        layout(data=2, distributed_optimizer=True, overlap=True),
        {"optim": {"clip_grad": 0.01}, "train": {"dtype": "bf16"}},
    ),
    "tp2": (layout(tensor=2), {"optim": {"clip_grad": 0.01}}),
    "pp2, a stage trains nothing": (
        layout(pipeline=2),
        {"optim": {"clip_grad": 0.01}, "trainable": ("patch_embedding",)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_the_optimizers_own_step(gloo_pools: Any, name: str) -> None:
    parallel, changes = CASES[name]
    pool = gloo_pools[parallel.world_size]
    found = pool.run(updated, parallel, changes, False)
    for (norms, weights), (own_norms, own) in zip(
        found, pool.run(updated, parallel, changes, True), strict=True
    ):
        assert norms == own_norms and norms[0] > 0.01
        assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))


def prepared(parallel: ParallelConfig) -> list[str]:
    """What a step asks the optimizer for, in a gloo worker."""
    from megatron_eve.training.step import train_step

    config = run_config(tiny_model(), parallel, optim={"clip_grad": 0.01})
    training, state = build_all(config, weights=None)
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("prepare_grads", "get_grad_norm", "step_with_ready_grads", "step"):
            real = getattr(training.optimizer, name)

            def counted(name: str = name, real: Any = real) -> Any:
                calls.append(name)
                return real()

            patch.setattr(training.optimizer, name, counted)
        train_step(
            training.wrapped,
            packs_of_rank(global_batch(2), config=config, state=state),
            optimizer=training.optimizer,
            schedule=training.schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
    return calls


def test_a_step_prepares_gradients_and_takes_their_norm_once(gloo1: Any) -> None:
    assert gloo1.run(prepared, layout()) == [
        ["prepare_grads", "get_grad_norm", "step_with_ready_grads"]
    ]
