# SPDX-License-Identifier: Apache-2.0
"""Runs of the `te` backend in gloo workers that find the stand-in of Transformer Engine (stand_in_te/)."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config.schema import RunConfig
from tests.support.canonical import Shard, local_shards
from tests.support.gloo import GlooPool
from tests.support.save_weights import save_weights
from tests.support.tiny import random_samples
from tests.support.train_once import build, packs_of_rank

STAND_IN = Path(__file__).parent / "stand_in_te"


class PoolWithStandIn(GlooPool):
    """Workers inherit sys.path when they start, and have imported nothing."""

    def _context(self) -> Any:
        return multiprocessing.get_context("spawn")

    def _start(self) -> None:
        sys.path.insert(0, str(STAND_IN))
        try:
            super()._start()
        finally:
            sys.path.remove(str(STAND_IN))


def loss_and_gradients(config: RunConfig, weights: str) -> tuple[list[float], list[Shard]]:
    """One global batch of two packs: the logged sums of each micro-batch, and this rank's gradients."""
    from megatron_eve.training.step import forward_backward

    chunks, wrapped, state, _ = build(config, weights=weights)
    packs = packs_of_rank(
        [random_samples(5, seed=seed) for seed in (10, 11)], config=config, state=state
    )
    logged = forward_backward(wrapped, packs, config=config, state=state)
    sums = [float(value) for pair in logged for value in pair]
    return sums, local_shards(chunks, lambda param: getattr(param, "main_grad", None))


def resave(config: RunConfig, source: str, out: str) -> list[str]:
    """Load with this backend, save with it; the names of its parameters."""
    (chunk,), *_ = build(config, weights=source)
    save_weights([chunk], out, config_text="")
    return [name for name, _ in chunk.named_parameters()]


def precision_of_linears(config: RunConfig, weights: str) -> dict[str, dict[str, Any]]:
    """After one global batch: how often each linear computed in FP8 and in BF16, and its scales."""
    from megatron_eve.training.step import forward_backward

    (chunk,), wrapped, state, _ = build(config, weights=weights)
    packs = packs_of_rank(
        [random_samples(5, seed=seed) for seed in (10, 11)], config=config, state=state
    )
    forward_backward(wrapped, packs, config=config, state=state)
    return {
        name: {
            "fp8": module.forwards_in_fp8,
            "bf16": module.forwards_in_bf16,
            "scales": dict(module.scales),
            "is_first": module.is_first_microbatch,
        }
        for name, module in chunk.named_modules()
        if hasattr(module, "forwards_in_fp8")
    }


def flags_after_announcing_a_step(config: RunConfig, weights: str) -> list[bool]:
    """What megatron-core's schedules tell quantized linears before the first micro-batch of a step."""
    (chunk,), (wrapped,), *_ = build(config, weights=weights)
    linears = [m for m in chunk.modules() if hasattr(m, "is_first_microbatch")]
    for linear in linears:
        linear.is_first_microbatch = False
    wrapped.set_is_first_microbatch()
    return [linear.is_first_microbatch for linear in linears]


def workspaces_by_stream() -> list[bool]:
    """Whether products on one stream share a workspace, and whether products on two do; before and after."""
    import importlib

    import torch
    from transformer_engine.pytorch.cpp_extensions import gemm

    importlib.reload(gemm)  # as before any run replaced its function
    from megatron_eve.model.te import give_each_stream_a_workspace

    class Stream:
        cuda_stream = 1

    stream = Stream()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        found = []
        for _ in range(2):
            stream.cuda_stream = 1
            first, again = (gemm.get_cublas_workspace(0, False, False) for _ in range(2))
            stream.cuda_stream = 2
            other = gemm.get_cublas_workspace(0, False, False)
            found += [first is again, first is other]
            give_each_stream_a_workspace()
            give_each_stream_a_workspace()
    return found
