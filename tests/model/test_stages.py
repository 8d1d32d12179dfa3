# SPDX-License-Identifier: Apache-2.0
"""After an optimizer step exactly the stage's parameters have changed, and frozen ones have cost nothing."""

from typing import Any

import pytest
import torch

from megatron_eve.config.schema import SplitConfig
from tests.support.tiny import ALL, DENSE, layout, naive_pack, tiny_model
from tests.support.train_once import ALIGN, TOKENS, build_all, global_batch, run_config

STAGES = {
    "1": (DENSE, ("patch_embedding",)),
    "2.1": (ALL, ("patch_embedding", "vision")),
    "2.2": (ALL, ("patch_embedding", "vision", "text")),
    "text": (DENSE, ("text",)),
    "norm only": (SplitConfig(norm=True, attention=False, ffn=False), ("vision",)),
}


def _changed(split: SplitConfig, trainable: Any, parallel: Any) -> dict[str, Any]:
    """Names that changed, names in gradient buffers, and elements of optimizer state, of one real step."""
    from megatron_eve.training.step import train_step

    config = run_config(
        tiny_model(split), parallel, trainable=trainable, optim={"warmup_fraction": 0.0}
    )
    training, state = build_all(config, weights=None)
    (chunk,), wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    samples = global_batch(2)[state.dp_rank :: state.dp_size]
    packs = [naive_pack(s, model=config.model, tokens=TOKENS, align=ALIGN) for s in samples]
    train_step(
        wrapped,
        packs,
        optimizer=optimizer,
        schedule=schedule,
        config=config,
        state=state,
        stop_requested=False,
    )
    return {
        "changed": {n for n, p in chunk.named_parameters() if not torch.equal(p, before[n])},
        "names": set(before),
        "trainable": sum(p.numel() for p in chunk.parameters() if p.requires_grad),
        "buffers": sum(p.numel() for b in wrapped[0].buffers for p in b.params),
        "moments": sum(
            value.numel()
            for chained in optimizer.chained_optimizers
            for per_param in chained.optimizer.state.values()
            for name, value in per_param.items()
            if name == "exp_avg"
        ),
    }


def _expected(names: set[str], trainable: tuple[str, ...]) -> set[str]:
    def group(name: str) -> str:
        if name.startswith("patch_embedding."):
            return "patch_embedding"
        return "vision" if ".vision." in name else "text"

    return {name for name in names if group(name) in trainable}


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_stage_is_trained(gloo1, stage):  # type: ignore[no-untyped-def]
    split, trainable = STAGES[stage]
    (seen,) = gloo1.run(_changed, split, trainable, layout())
    assert seen["changed"] == _expected(seen["names"], trainable)
    assert seen["buffers"] == seen["trainable"], "gradient buffers hold trainable parameters only"
    assert seen["moments"] == seen["trainable"], "and so do the optimizer's moments"


def test_distributed_optimizer_shards_the_moments(gloo2):  # type: ignore[no-untyped-def]
    split, trainable = STAGES["2.1"]
    parallel = layout(data=2, distributed_optimizer=True)
    seen = gloo2.run(_changed, split, trainable, parallel)
    assert seen[0]["changed"] == _expected(seen[0]["names"], trainable)
    assert sum(rank["moments"] for rank in seen) == seen[0]["trainable"]
