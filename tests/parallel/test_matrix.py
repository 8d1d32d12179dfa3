# SPDX-License-Identifier: Apache-2.0
"""Every layout computes what the plain single-process reference computes: loss, every gradient, one optimizer step.

A loss alone proves nothing (a missing all-reduce leaves it bit-equal), so everything is compared, in real gloo
processes, with weights that went through the converter and a checkpoint. A part of the matrix runs in `make test`, all
of it in `make test-matrix`; bounds and layouts are in tests/support/matrix.py."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.canonical import assemble
from tests.support.matrix import (
    LAYOUTS,
    LOSS_RTOL,
    SPLITS,
    STAGES,
    Check,
    Expected,
    Layout,
    differences,
    model_of,
    reference_step,
    step_config,
    take_steps,
)
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import (
    global_batch,
    read_weights,
    run_config,
    write_reference_weights,
)

EVERY_CASE = [
    (split, stage)
    for split in SPLITS
    for stage in STAGES
    if SPLITS[split].any or stage != "2.1"  # a dense decoder has no vision branch to train
]

FAST = {
    "1": EVERY_CASE,
    "tp2 sp": [
        ("all", "2.2"),
        ("dense", "1"),
        ("ffn", "2.1"),
        ("all-tied", "2.2"),
        ("all-wide", "2.2"),
    ],
    "tp2": [("norm", "2.2"), ("all", "2.1"), ("all", "2.2")],
    "tp2 sp full": [("all", "2.1"), ("dense", "1")],
    "pp2": [("dense", "1"), ("all", "2.1"), ("all-tied", "2.2")],
    "pp2 selective": [("all", "2.2")],
    "pp2 virtual": [("all-tied", "2.2"), ("all", "2.2")],
    "dp2 overlap": [("all", "2.1")],
    "dp2 distopt overlap": [("all", "2.2"), ("all", "2.1"), ("dense", "1")],
    "cp2": [("all", "2.2"), ("dense", "1"), ("norm", "2.1")],
    "cp2 distopt overlap": [("ffn", "2.2")],
    "tp2 sp pp2": [("all-tied", "2.2"), ("all", "2.2")],
    "tp2 sp cp2": [("all", "2.2")],
    "tp2 sp cp2 distopt overlap": [("all", "2.2")],
    "pp2 cp2": [("all", "2.1")],
}
"""Cases of each layout in `make test`."""

PER_TASK = 5  # checks; a layout is started once for each task, and a task must end before the pool's timeout


@pytest.fixture(scope="module")
def references(gloo1: Any, tmp_path_factory: Any) -> Callable[[str], tuple[Path, Expected]]:
    """Weights folder and expected step of a split, made when first asked for."""
    made: dict[str, tuple[Path, Expected]] = {}

    def get(split: str) -> tuple[Path, Expected]:
        if split not in made:
            folder = tmp_path_factory.mktemp(split) / "weights"
            gloo1.run(write_reference_weights, model_of(split), str(folder))
            made[split] = folder, reference_step(model_of(split), global_batch(4))
        return made[split]

    return get


def check_layout(
    pools: Any, references: Any, spread: Layout, cases: Iterable[tuple[str, str]]
) -> None:
    cases = list(cases)
    checks = [
        Check(
            config=step_config(model_of(split), spread, stage=stage),
            weights=str(references(split)[0]),
            packs=global_batch(4),
        )
        for split, stage in cases
    ]
    pool = pools[spread.parallel.world_size]
    taken = [
        steps
        for first in range(0, len(checks), PER_TASK)
        for steps in zip(*pool.run(take_steps, checks[first : first + PER_TASK]), strict=True)
    ]
    problems = {}
    for (split, stage), steps in zip(cases, taken, strict=True):
        found = differences(steps, references(split)[1], stage=stage)
        if found:
            problems[f"split {split}, stage {stage}"] = found
    assert not problems


@pytest.mark.parametrize("name", FAST)
def test_layout(gloo_pools, references, name):  # type: ignore[no-untyped-def]
    check_layout(gloo_pools, references, LAYOUTS[name], FAST[name])


@pytest.mark.matrix
@pytest.mark.parametrize("name", LAYOUTS)
def test_matrix(gloo_pools, references, name):  # type: ignore[no-untyped-def]
    check_layout(gloo_pools, references, LAYOUTS[name], EVERY_CASE)


@pytest.mark.parametrize("name", ["tp2 sp", "dp2 distopt"])
def test_bf16_is_the_reference_rounded(gloo_pools, references, name):  # type: ignore[no-untyped-def]
    """8 bits of mantissa: a relative error of 2^-8 per operation, some dozens of them deep."""
    weights, expected = references("all")
    config = step_config(model_of("all"), LAYOUTS[name], stage="2.2", train={"dtype": "bf16"})
    check = Check(config=config, weights=str(weights), packs=global_batch(4))
    steps = [steps[0] for steps in gloo_pools[2].run(take_steps, [check])]
    assert steps[0].metrics["loss"] == pytest.approx(expected.loss, rel=2**-7)
    gradients = assemble(step.gradients for step in steps)
    for parameter, exact in expected.gradients.items():
        got = gradients[parameter][: len(exact)]
        error = float((got - exact).norm() / exact.norm())
        assert error < 0.1, f"{parameter}: {error:.3f}"


def test_a_missing_all_reduce_is_noticed(gloo_pools, references):  # type: ignore[no-untyped-def]
    """The mutation: without the sequence-parallel all-reduce the loss is the same, but not the norms' gradients."""
    weights, expected = references("all")
    config = step_config(model_of("all"), LAYOUTS["tp2 sp"], stage="2.2")
    check = Check(config=config, weights=str(weights), packs=global_batch(4))
    ranks = gloo_pools[2].run(take_steps, [check], drop_all_reduce=True)
    steps = [steps[0] for steps in ranks]
    assert steps[0].metrics["loss"] == pytest.approx(expected.loss, rel=LOSS_RTOL)
    with pytest.raises(AssertionError, match="two ranks' copies differ"):
        differences(steps, expected, stage="2.2")
    norm, fc1 = "input_layernorm.vision.weight", "mlp.linear_fc1.vision.weight"
    assert not close_to_reference(steps[0], expected, norm)
    assert close_to_reference(steps[0], expected, fc1)


def close_to_reference(step: Any, expected: Expected, parameter: str) -> bool:
    """Whether every part of this parameter, of all layers, that the rank holds is as in the reference."""
    layers = [expected.gradients[f"decoder.layers.{i}.{parameter}"] for i in range(4)]
    whole = torch.stack(layers).numpy()
    shards = [shard for shard in step.gradients if shard.name == f"decoder.layers.{parameter}"]
    assert shards
    return all(
        np.allclose(
            shard.values,
            whole[
                tuple(
                    slice(begin, begin + size)
                    for begin, size in zip(shard.offset, shard.values.shape, strict=True)
                )
            ],
            rtol=1e-3,
            atol=1e-6,
        )
        for shard in shards
    )


def test_a_wrong_update_is_noticed(gloo_pools, references):  # type: ignore[no-untyped-def]
    """The mutation: a learning rate 0.1% too high shows in every trained weight, and in nothing else."""
    weights, expected = references("all")
    config = step_config(model_of("all"), LAYOUTS["1"], stage="2.1")
    optim = dataclasses.replace(config.optim, peak_lr=config.optim.peak_lr * 1.001)
    check = Check(
        config=dataclasses.replace(config, optim=optim), weights=str(weights), packs=global_batch(4)
    )
    steps = [steps[0] for steps in gloo_pools[1].run(take_steps, [check])]
    found = {problem.split(": ")[0] for problem in differences(steps, expected, stage="2.1")}
    assert found == {name for name in expected.trainable("2.1") if ".vision." in name}


def test_random_weights_do_not_depend_on_tensor_parallelism(gloo1, gloo2, tmp_path):  # type: ignore[no-untyped-def]
    from tests.support.fresh import save_fresh

    model = dataclasses.replace(tiny_model(), vocab_size=64)  # no padding rows for either size
    gloo1.run(save_fresh, run_config(model, layout()), str(tmp_path / "a"))
    gloo2.run(save_fresh, run_config(model, layout(tensor=2)), str(tmp_path / "b"))
    (one,) = gloo1.run(read_weights, model, str(tmp_path / "a"))
    (two,) = gloo1.run(read_weights, model, str(tmp_path / "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
