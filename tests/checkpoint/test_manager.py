# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: what they hold under the overlapped parameter gather, and the learning rate after a resume."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.checkpoint.manager import CheckpointManager, TrainingState
from megatron_eve.config.schema import ParallelConfig
from megatron_eve.training.non_finite import MAX_SKIPS_IN_A_ROW, NonFiniteLossError, SkipGuard
from megatron_eve.training.step import train_step
from tests.support.tiny import DENSE, layout, tiny_model
from tests.support.train_once import (
    build_all,
    global_batch,
    packs_of_rank,
    read_weights,
    run_config,
)


def assemble(
    parallel: ParallelConfig, *, steps: int, model: Any = None, **changes: Any
) -> tuple[Any, TrainingState, Any]:
    config = run_config(model or tiny_model(), parallel, **changes)
    training, state = build_all(config, weights=None, steps=steps)
    return config, training, state


def take_steps(config: Any, training: TrainingState, state: Any, *, count: int) -> list[Any]:
    """The metrics of each step."""
    packs = packs_of_rank(global_batch(2), config=config, state=state)
    return [
        train_step(
            training.wrapped,
            packs,
            optimizer=training.optimizer,
            schedule=training.schedule,
            config=config,
            state=state,
            stop_requested=False,
        ).metrics
        for _ in range(count)
    ]


def train_and_save(parallel: ParallelConfig, run_dir: Path) -> str:
    config, training, state = assemble(parallel, steps=10, optim={"warmup_fraction": 0.0})
    take_steps(config, training, state, count=3)
    manager = CheckpointManager(run_dir, keep_last=1, config_text="")
    return str(manager.save(training, step=3, data={}))


def test_overlapped_gather_saves_the_updated_weights(gloo1, gloo2, tmp_path):  # type: ignore[no-untyped-def]
    """Without a gather before the save, each rank would write the others' shards as they were before the update."""
    saved = {}
    for name, overlap in (("plain", False), ("overlap", True)):
        parallel = layout(data=2, distributed_optimizer=True, overlap=overlap)
        (path, _) = gloo2.run(train_and_save, parallel, tmp_path / name)
        (saved[name],) = gloo1.run(read_weights, tiny_model(), path)
    assert all(torch.equal(saved["plain"][n], saved["overlap"][n]) for n in saved["plain"])


def rate_after_resume(run_dir: Path, steps: int, peak_lr: float) -> float:
    config, training, state = assemble(
        layout(), steps=steps, optim={"peak_lr": peak_lr, "warmup_fraction": 0.0, "min_lr": 0.0}
    )
    manager = CheckpointManager(run_dir, keep_last=1, config_text="")
    newest = manager.newest()
    if newest is None:
        take_steps(config, training, state, count=2)
        manager.save(training, step=2, data={})
    else:
        manager.load(training, newest)
    return float(next(g["lr"] for g in training.optimizer.param_groups if g["default_config"]))


def test_a_lengthened_run_follows_its_new_schedule(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    """cosine at 2 of 4 steps is half the peak; at 2 of 8 it is 0.8536 of it."""
    (before,) = gloo1.run(rate_after_resume, tmp_path, 4, 1e-3)
    assert before == pytest.approx(0.5e-3)
    (after,) = gloo1.run(rate_after_resume, tmp_path, 8, 2e-3)
    assert after == pytest.approx(0.85355e-3 * 2, rel=1e-4)


def step_with_infinite_gradient() -> tuple[str, bool]:
    config, training, state = assemble(layout(), steps=10, optim={"warmup_fraction": 0.0})
    (chunk,) = training.chunks
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    chunk.final_layernorm.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteLossError) as caught:
        take_steps(config, training, state, count=1)
    unchanged = all(torch.equal(p, before[name]) for name, p in chunk.named_parameters())
    return str(caught.value), unchanged


def test_an_infinite_gradient_is_refused_before_the_update(gloo1):  # type: ignore[no-untyped-def]
    ((message, unchanged),) = gloo1.run(step_with_infinite_gradient)
    assert "gradient norm is" in message
    assert "First seen in: " in message
    assert "although the loss is finite" in message
    assert unchanged


def step_that_is_skipped(weight: str, row: int) -> tuple[dict[str, float], bool, list[str]]:
    """One step with a weight that is not a number in one row, and one after it is repaired."""
    config, training, state = assemble(
        layout(), steps=10, optim={"warmup_fraction": 0.0}, train={"on_non_finite": "skip"}
    )
    (chunk,) = training.chunks
    parameter = dict(chunk.named_parameters())[weight]
    healthy = parameter.detach()[row].clone()
    parameter.data[row] = float("nan")
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_eve.training.step").addHandler(handler)
    (skipped,) = take_steps(config, training, state, count=1)
    same = all(
        torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in chunk.named_parameters()
    )
    parameter.data[row] = healthy
    (after,) = take_steps(config, training, state, count=1)
    assert after["skipped"] == 0 and math.isfinite(after["loss"])
    return skipped, same, messages


def test_a_skipped_step_updates_nothing_and_names_the_module(gloo1):  # type: ignore[no-untyped-def]
    """The first module in the order of computation, by modality; the run goes on."""
    weight = "decoder.layers.1.mlp.linear_fc2.vision.weight"
    ((metrics, unchanged, (message,)),) = gloo1.run(step_that_is_skipped, weight, 3)
    assert metrics["skipped"] == 1 and math.isnan(metrics["loss"]) and unchanged
    assert "First seen in: output of decoder.layers.1.mlp.linear_fc2.vision (" in message


def test_too_many_skipped_steps_end_the_run() -> None:
    guard = SkipGuard()
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        guard.count(skipped=True)
    guard.count(skipped=False)
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        guard.count(skipped=True)
    with pytest.raises(NonFiniteLossError, match="10 steps in a row were not finite"):
        guard.count(skipped=True)


def train_stage_1(
    parallel: ParallelConfig, dtype: str, run_dir: Path
) -> tuple[list[dict[str, float]], list[str]]:
    """Two more steps of a run of stage 1; the first call takes and saves two steps before. Returns their metrics and
    what megatron-core's checkpoints warned of."""
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron.core.dist_checkpointing.validation")
    logger.addHandler(handler)
    try:
        return stage_1_metrics(parallel, dtype, run_dir), warned
    finally:
        logger.removeHandler(handler)


def stage_1_metrics(parallel: ParallelConfig, dtype: str, run_dir: Path) -> list[dict[str, float]]:
    config, training, state = assemble(
        parallel,
        steps=10,
        model=tiny_model(DENSE),
        trainable=("patch_embedding",),
        optim={"warmup_fraction": 0.0},
        train={"dtype": dtype},
    )
    manager = CheckpointManager(run_dir, keep_last=1, config_text="")
    newest = manager.newest()
    if newest is None:
        take_steps(config, training, state, count=2)
        manager.save(training, step=2, data={})
    else:
        manager.load(training, newest)
    return take_steps(config, training, state, count=2)


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [
        (layout(pipeline=2), "fp32"),
        (layout(pipeline=2), "bf16"),
        (layout(pipeline=2, virtual=2), "fp32"),
        (layout(pipeline=2, data=2, distributed_optimizer=True, overlap=True), "bf16"),
    ],
    ids=["pp2", "pp2 bf16", "pp2 virtual", "pp2 dp2 distopt overlap bf16"],
)
def test_a_pipeline_stage_that_trains_nothing(gloo_pools, tmp_path, parallel, dtype):  # type: ignore[no-untyped-def]
    """In stage 1 only the first pipeline stage has something to train; all take steps, save, and resume to the bit."""
    pool = gloo_pools[parallel.world_size]
    first = pool.run(train_stage_1, parallel, dtype, tmp_path)
    second = pool.run(train_stage_1, parallel, dtype, tmp_path)
    on, resumed = ([metrics for metrics, _ in ranks] for ranks in (first, second))
    assert resumed == on
    assert [warned for _, warned in first + second if warned] == []
    assert all(ranks == on[0] for ranks in on), "metrics are the same on every process"
    assert on[0][0]["loss"] != on[0][1]["loss"]
    assert on[0][0]["grad_norm"] > 0
    assert on[0][0]["patch_embedding_lr"] > 0
