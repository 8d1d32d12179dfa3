# SPDX-License-Identifier: Apache-2.0
"""Frozen weights cost nothing but themselves: gradient buffers, optimizer state and data-parallel traffic are those of
the trained parameters to the byte, with the distributed optimizer on two ranks.

The tiny model's tensors are all multiples of 128 elements, so that megatron-core's buffers need no padding."""

import dataclasses
from typing import Any

import pytest

from megatron_eve.config.schema import ModelConfig, SplitConfig
from tests.support.tiny import ALL, DENSE, layout, naive_pack, tiny_model
from tests.support.train_once import ALIGN, TOKENS, build_all, global_batch, run_config

FP32 = 4
STAGES = {
    "1": (DENSE, ("patch_embedding",)),
    "2.1": (ALL, ("patch_embedding", "vision")),
    "2.2": (ALL, ("patch_embedding", "vision", "text")),
}


def unpadded_model(split: SplitConfig) -> ModelConfig:
    """Every parameter a multiple of 128 elements."""
    return dataclasses.replace(
        tiny_model(split, layers=2),
        hidden_size=128,
        ffn_hidden_size=128,
        head_dim=32,
        vocab_size=128,
        patch_embed_dim=128,
    )


def count(split: SplitConfig, trainable: Any, parallel: Any) -> dict[str, Any]:
    """One real step to allocate the moments, one under observation."""
    from megatron_eve.training.step import train_step
    from tools.bench.counting import CollectiveTraffic, held_bytes

    config = run_config(unpadded_model(split), parallel, trainable=trainable)
    training, state = build_all(config, weights=None)
    (chunk,), wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    samples = global_batch(2)[state.dp_rank :: state.dp_size]
    packs = [naive_pack(s, model=config.model, tokens=TOKENS, align=ALIGN) for s in samples]
    for _ in range(2):
        with CollectiveTraffic() as traffic:
            train_step(
                wrapped,
                packs,
                optimizer=optimizer,
                schedule=schedule,
                config=config,
                state=state,
                stop_requested=False,
            )
    frozen = [p for p in chunk.parameters() if not p.requires_grad]
    return {
        "held": held_bytes(wrapped, optimizer),
        "traffic": traffic.tensor_bytes(),
        "all": sum(p.numel() for p in chunk.parameters()),
        "trained": sum(p.numel() for p in chunk.parameters() if p.requires_grad),
        "frozen_with_gradient": sum(p.grad is not None or hasattr(p, "main_grad") for p in frozen),
    }


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_tensors_have_no_buffer_no_state_no_traffic(gloo2, stage):  # type: ignore[no-untyped-def]
    split, trainable = STAGES[stage]
    ranks = gloo2.run(count, split, trainable, layout(data=2, distributed_optimizer=True))
    trained, everything = ranks[0]["trained"], ranks[0]["all"]
    assert (trained < everything) == (stage != "2.2")
    for rank in ranks:
        assert rank["frozen_with_gradient"] == 0
        assert rank["held"].weights == FP32 * everything
        assert rank["held"].gradient_buffers == FP32 * trained
        # gradients are reduced once and updated weights gathered once; nothing else is larger than a few numbers
        assert sorted(rank["traffic"].values()) == [FP32 * trained] * 2
    assert sum(rank["held"].optimizer_state for rank in ranks) == 2 * FP32 * trained


def test_without_distributed_optimizer_one_all_reduce_of_the_trained(gloo2):  # type: ignore[no-untyped-def]
    split, trainable = STAGES["2.1"]
    for rank in gloo2.run(count, split, trainable, layout(data=2)):
        assert list(rank["traffic"].values()) == [FP32 * rank["trained"]]
        assert rank["held"].gradient_buffers == FP32 * rank["trained"]
        assert rank["held"].optimizer_state == 2 * FP32 * rank["trained"]
