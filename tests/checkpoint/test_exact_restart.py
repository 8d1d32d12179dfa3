# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint gives back: the same bits in the same layout, the same canonical tensors in any other."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.checkpoint.manifest import read_manifest
from megatron_eve.config.megatron import ddp_config
from megatron_eve.config.schema import ModelConfig, ParallelConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.training import wrap
from megatron_eve.training.step import train_step
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import build_all, global_batch, packs_of_rank, run_config

# 61 rows of 40 numbers: nothing is a multiple of the 64 and 128 elements to which buffers are padded.
ODD = replace(tiny_model(tied=True, layers=2), hidden_size=40, ffn_hidden_size=36)
EVEN = tiny_model(layers=2)
DISTOPT = dict(distributed_optimizer=True)
BUCKET_SIZE = (
    1500  # elements; megatron-core's own is 40 million, so that a tiny model would have one bucket
)


@dataclass(frozen=True)
class Outcome:
    """What a rank reports."""

    losses: list[float]
    hashes: dict[str, Any]  # canonical, after the last step
    loaded: dict[str, Any]  # canonical, right after the load


def _small_buckets(parallel: ParallelConfig) -> Any:
    return replace(ddp_config(parallel), bucket_size=BUCKET_SIZE)


def train(
    parallel: ParallelConfig,
    run_dir: Path,
    model: ModelConfig,
    *,
    steps: int,
    dtype: str = "fp32",
    sample_align: int = 2,
    save: bool = False,
) -> Outcome:
    """Take `steps` steps, from the run directory's newest checkpoint if it has one."""
    config = run_config(
        model, parallel, train={"dtype": dtype}, data={"sample_align": sample_align}
    )
    with patch.object(wrap, "ddp_config", _small_buckets):
        training, state = build_all(config, weights=None)
    chunks, wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    manager = CheckpointManager(run_dir, keep_last=5, config_text="", async_save=True)
    resumed = manager.resume(training)
    first = resumed.step if resumed else 0
    loaded = canonical_hashes(chunks, optimizer) if resumed else {}
    losses = []
    for step in range(first, first + steps):
        batch = global_batch(6)[2 * (step % 3) : 2 * (step % 3) + 2]
        result = train_step(
            wrapped,
            packs_of_rank(batch, config=config, state=state),
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
        losses.append(result.metrics["loss"])
        manager.poll()
    if save:
        manager.save(training, step=first + steps, data={})
    manager.wait()
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return Outcome(losses, canonical_hashes(chunks, optimizer), loaded)


SAME = {
    "1 distopt overlap": (layout(overlap=True, **DISTOPT), ODD, "fp32"),
    "1 distopt overlap bf16": (layout(overlap=True, **DISTOPT), ODD, "bf16"),
    "1 bf16": (layout(), ODD, "bf16"),
    "dp2 distopt overlap bf16": (layout(data=2, overlap=True, **DISTOPT), ODD, "bf16"),
    "pp2 distopt": (layout(pipeline=2, **DISTOPT), ODD, "fp32"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_goes_on_with_the_same_bits(gloo_pools, tmp_path, name):  # type: ignore[no-untyped-def]
    """Also where buckets end in padding: there megatron-core by itself saves shifted moments and weights."""
    parallel, model, dtype = SAME[name]
    pool = gloo_pools[parallel.world_size]
    options = dict(dtype=dtype, model=model)
    whole = pool.run(train, parallel, tmp_path / "whole", steps=4, **options)
    before = pool.run(train, parallel, tmp_path / "run", steps=2, save=True, **options)
    after = pool.run(train, parallel, tmp_path / "run", steps=2, **options)
    assert after[0].loaded == before[0].hashes
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in before[0].hashes)
    assert [*before[0].losses, *after[0].losses] == whole[0].losses
    assert after[0].hashes == whole[0].hashes != before[0].hashes


def shifted(parallel: ParallelConfig, run_dir: Path) -> str:
    """What a resume says if megatron-core's offsets are left as they are."""
    from megatron_eve.checkpoint import training_state

    with patch.object(training_state, "_keep_bucket_padding", lambda optimizer: None):
        train(parallel, run_dir, ODD, steps=1, save=True)
        with pytest.raises(CheckpointError) as caught:
            train(parallel, run_dir, ODD, steps=1)
    return str(caught.value)


def test_tensors_that_megatron_core_saves_shifted_are_refused_after_the_load(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    """The files are as they were written, yet not what was in memory: only the canonical hashes tell."""
    (message,) = gloo1.run(shifted, layout(overlap=True, **DISTOPT), tmp_path)
    assert "no usable checkpoint" in message
    assert "after loading, decoder.layers.input_layernorm" in message
    assert "are not what was saved" in message


CHAINS = {
    "tied, odd sizes": (
        ODD,
        [
            layout(**DISTOPT),
            layout(tensor=2, sequence_parallel=True, **DISTOPT),
            layout(pipeline=2, **DISTOPT),
            layout(data=2, overlap=True, **DISTOPT),
            layout(context=2, **DISTOPT),
            layout(**DISTOPT),
        ],
    ),
    "untied": (
        tiny_model(layers=4),
        [
            layout(),
            layout(pipeline=2, virtual=2),
            layout(pipeline=2, tensor=2),
            layout(),
        ],
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_any_layout_goes_on_from_any_other(gloo_pools, tmp_path, name):  # type: ignore[no-untyped-def]
    """Each loads the canonical tensors that the one before saved, and has the loss that one process would have had."""
    model, chain = CHAINS[name]
    options = dict(model=model, sample_align=4)
    single = gloo_pools[1].run(train, layout(), tmp_path / "one", steps=len(chain), **options)
    saved = None
    for step, parallel in enumerate(chain):
        pool = gloo_pools[parallel.world_size]
        ranks = pool.run(train, parallel, tmp_path / "run", steps=1, save=True, **options)
        if saved is not None:
            assert all(rank.loaded == saved for rank in ranks), parallel
        assert ranks[0].losses[0] == pytest.approx(single[0].losses[step], rel=1e-6), parallel
        saved = ranks[0].hashes
        stored = read_manifest(tmp_path / "run" / "checkpoints" / f"step_{step + 1:08d}")
        assert stored.tensors == saved
