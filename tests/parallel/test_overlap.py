# SPDX-License-Identifier: Apache-2.0
"""Communication that overlaps with computation changes when numbers move, never the numbers: bits after three steps.

A model this small fits into one bucket, with which there is nothing to overlap; so buckets are made small. Then a
weight used before its gather has ended, or a gradient reduced before it is complete, shows in the second step."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.support.canonical import Shard, local_shards
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import EVERYTHING, build_all, global_batch, packs_of_rank, run_config

LAYOUTS = {
    "dp2": dict(data=2),
    "cp2": dict(context=2),
    "tp2 sp dp2": dict(tensor=2, sequence_parallel=True, data=2),
    "pp2 dp2": dict(pipeline=2, data=2),
    "pp2 virtual dp2": dict(pipeline=2, virtual=2, data=2),
}
"""Sums over two data ranks only: those of four may be added in another order."""

TRAINABLE = {"all": EVERYTHING, "2.1": ("patch_embedding", "vision"), "1": ("patch_embedding",)}
SMALL_BUCKET = 1000  # elements; the tiny model has 70,000


def three_steps(config: Any, recompute: str, bucket: int | None) -> dict[str, Any]:
    """Metrics of three steps, the number of gradient buckets, and this rank's weights at the end; in a gloo worker."""
    from megatron_eve.training import wrap
    from megatron_eve.training.step import train_step

    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, recompute=recompute)
    )
    of_product = wrap.ddp_config
    wrap.ddp_config = lambda p: dataclasses.replace(of_product(p), bucket_size=bucket)
    try:
        training, state = build_all(config, weights=None)
    finally:
        wrap.ddp_config = of_product
    chunks, wrapped = training.chunks, training.wrapped
    optimizer, schedule = training.optimizer, training.schedule
    packs = packs_of_rank(global_batch(4), config=config, state=state)
    metrics = [
        train_step(
            wrapped,
            packs,
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        ).metrics
        for _ in range(3)
    ]
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    buckets = sum(len(buffer.buckets) for chunk in wrapped for buffer in chunk.buffers)
    weights: list[Shard] = local_shards(chunks, lambda param: param)
    return {"metrics": metrics, "buckets": buckets, "weights": weights}


def overlapped_and_plain(pools: Any, name: str, trained: str) -> None:
    spread = LAYOUTS[name]
    recompute = "full" if trained == "2.1" else "none"
    runs = {}
    for overlap in (False, True):
        parallel = layout(**spread, distributed_optimizer=True, overlap=overlap)
        config = run_config(
            tiny_model(),
            parallel,
            trainable=TRAINABLE[trained],
            optim=dict(warmup_fraction=0.0, peak_lr=1e-2, patch_embedding_lr=1e-2, clip_grad=None),
        )
        pool = pools[parallel.world_size]
        runs[overlap] = pool.run(three_steps, config, recompute, SMALL_BUCKET if overlap else None)
    assert trained == "1" or runs[True][0]["buckets"] > runs[False][0]["buckets"]
    for plain, overlapped in zip(runs[False], runs[True], strict=True):
        for want, got in zip(plain["metrics"], overlapped["metrics"], strict=True):
            assert got["loss"] == want["loss"]
            # Its square is added up shard by shard, and the buckets decide where a shard begins; it scales nothing.
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-6)
        for want, got in zip(plain["weights"], overlapped["weights"], strict=True):
            assert (got.name, got.offset) == (want.name, want.offset)
            assert np.array_equal(got.values, want.values), got.name


@pytest.mark.parametrize(("name", "trained"), [("dp2", "all"), ("cp2", "2.1"), ("dp2", "1")])
def test_overlap_changes_no_bit(gloo_pools, name, trained):  # type: ignore[no-untyped-def]
    overlapped_and_plain(gloo_pools, name, trained)


@pytest.mark.matrix
@pytest.mark.parametrize("trained", TRAINABLE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_overlap_in_every_layout(gloo_pools, name, trained):  # type: ignore[no-untyped-def]
    overlapped_and_plain(gloo_pools, name, trained)
