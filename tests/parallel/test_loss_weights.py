# SPDX-License-Identifier: Apache-2.0
"""The loss that was asked for, on packs that the product's data path makes of shards, in several layouts, against the
plain reference that takes the official micro-batches one by one."""

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_eve.config.schema import BatchConfig, RunConfig
from megatron_eve.data.sample import IGNORE
from tests.support.canonical import assemble
from tests.support.matrix import GRAD_RTOL, LOSS_RTOL, Layout
from tests.support.real_steps import (
    MODEL,
    RealStep,
    real_config,
    reference_gradients,
    samples_in_data_order,
    take_real_steps,
    write_data,
)
from tests.support.reference_eve import build_reference
from tests.support.tiny import RawSample, layout
from tests.support.train_once import write_reference_weights

SAMPLES = BatchConfig(unit="samples", size=12)
PACKS = BatchConfig(unit="packs", size=4)
MODES: dict[str, dict[str, Any]] = {
    "sample_mean": {},
    "sqrt_tokens": {},
    "official 2": {"loss_group_samples": 2},
    "official 4": {"loss_group_samples": 4},
    "global_tokens": {},
}
SPREADS = {
    "1": layout(),
    "tp2 sp": layout(tensor=2, sequence_parallel=True),
    "pp2": layout(pipeline=2),
    "cp2": layout(context=2),
    "dp2": layout(data=2, distributed_optimizer=True),
    "cp2 dp2": layout(context=2, data=2),
    "tp2 pp2 virtual": layout(pipeline=2, tensor=2, virtual=2),
}


@pytest.fixture(scope="module")
def folder(gloo1: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, tokenizer, and the reference's weights."""
    folder = write_data(tmp_path_factory.mktemp("loss-weights"))
    gloo1.run(write_reference_weights, MODEL, str(folder / "weights"))
    return folder


@cache
def in_data_order(folder: Path) -> list[tuple[str, RawSample]]:
    return samples_in_data_order(config_of(folder, "1", "global_tokens"))


def config_of(folder: Path, spread: str, mode: str, *, batch: BatchConfig = SAMPLES) -> RunConfig:
    optim = {"loss_normalization": mode.split()[0], **MODES[mode]}
    return real_config(folder, Layout(parallel=SPREADS[spread]), batch=batch, **optim)


@cache
def expected(folder: Path, mode: str, ids: tuple[str, ...]) -> tuple[float, dict[str, Tensor]]:
    """The reference's step of these samples, which it takes in data order."""
    samples = [sample for name, sample in in_data_order(folder) if name in ids]
    assert len(samples) == len(ids)
    config = config_of(folder, "1", mode)
    return reference_gradients(build_reference(MODEL), samples, config=config)


def take(
    pools: Any,
    folder: Path,
    spread: str,
    modes: Sequence[str],
    *,
    batch: BatchConfig = SAMPLES,
    **changes: Any,
) -> list[list[list[RealStep]]]:
    """[mode][step][rank]"""
    configs = [config_of(folder, spread, mode, batch=batch) for mode in modes]
    pool = pools[SPREADS[spread].world_size]
    ranks = pool.run(take_real_steps, configs, str(folder / "weights"), **changes)
    by_mode = zip(*ranks, strict=True)
    return [[list(step) for step in zip(*of_mode, strict=True)] for of_mode in by_mode]


def problems(folder: Path, mode: str, ranks: list[RealStep]) -> list[str]:
    """How the step of all ranks differs from the reference's; empty if it does not."""
    ids = tuple(sorted(ids_of(ranks)))
    loss, gradients = expected(folder, mode, ids)
    found = []
    for number, rank in enumerate(ranks):
        if abs(rank.metrics["loss"] - loss) > LOSS_RTOL * loss:
            found.append(f"rank {number}: loss {rank.metrics['loss']:.9g}, not {loss:.9g}")
    got = assemble(rank.gradients for rank in ranks)
    assert got.keys() == gradients.keys()
    for name, want in gradients.items():
        scale = want.abs().max()
        assert scale > 0, f"{name} has no gradient: nothing would be proved"
        error = float((got[name][: len(want)] - want).abs().max() / scale)
        if error > GRAD_RTOL:
            found.append(f"{name}: gradient off by {error:.1e}")
    return found


def ids_of(ranks: list[RealStep]) -> set[str]:
    return {name for rank in ranks for ids, _ in rank.packs for name in ids}


def test_the_steps_reach_every_edge(folder: Path) -> None:
    """Else the tests below would prove less than they say."""
    every = [sample for _, sample in in_data_order(folder)]
    counts = [int((sample.labels[1:] != IGNORE).sum()) for sample in every[:24]]
    assert min(n for n in counts if n) < 4
    assert max(counts) > 50
    assert 0 in counts, "a sample without labels"
    pairs = list(zip(counts[::2], counts[1::2], strict=True))
    assert (0, 0) in pairs, "a group without labels"
    assert any(not sample.images for sample in every[:12]), "text alone"
    assert any(0 in pair and any(pair) for pair in pairs), "a group of which a part has none"


@pytest.mark.parametrize("spread", [name for name in SPREADS if "virtual" not in name])
def test_the_loss_is_that_of_the_samples(gloo_pools: Any, folder: Path, spread: str) -> None:
    """Two steps of 12 samples, all settings: loss and every gradient."""
    modes = [*MODES] if SPREADS[spread].world_size <= 2 else ["sqrt_tokens", "official 2"]
    for mode, steps in zip(modes, take(gloo_pools, folder, spread, modes, steps=2), strict=True):
        for number, ranks in enumerate(steps):
            order = [name for name, _ in in_data_order(folder)[12 * number :][:12]]
            assert ids_of(ranks) == set(order)
            assert not problems(folder, mode, ranks), f"{mode}, step {number}"


def test_groups_lie_across_packs_and_ranks(gloo_pools: Any, folder: Path) -> None:
    """Of the steps above: some groups have their two samples in two packs, some on two ranks."""
    ((first, second),) = take(gloo_pools, folder, "dp2", ["official 2"], steps=2)
    for step in (first, second):
        held = [{(rank, number) for rank, of_rank in enumerate(step)
                 for number, (_, places) in enumerate(of_rank.packs) if {2 * group, 2 * group + 1} & {*places}}
                for group in range(6)]  # fmt: skip
        assert any(len({rank for rank, _ in packs}) == 2 for packs in held)
        assert any(len(packs) == 2 for packs in held)


@pytest.mark.parametrize("spread", ["1", "dp2", "tp2 pp2 virtual"])
def test_a_step_of_packs_forms_groups_in_data_order(
    gloo_pools: Any, folder: Path, spread: str
) -> None:
    """Which samples are in a step is the packer's choice; the last group may be smaller."""
    modes = ["official 4", "sqrt_tokens"]
    sizes = set()
    found = take(gloo_pools, folder, spread, modes, batch=PACKS, steps=2)
    for mode, steps in zip(modes, found, strict=True):
        for number, ranks in enumerate(steps):
            assert not problems(folder, mode, ranks), f"{mode}, step {number}"
            sizes.add(len(ids_of(ranks)) % 4)
    assert sizes - {0}, "a last group that is smaller"


def test_a_run_goes_on_in_another_layout(gloo_pools: Any, folder: Path) -> None:
    """The second step on other ranks than the first, in both units."""
    for batch in (SAMPLES, PACKS):
        (((first, *_),),) = take(gloo_pools, folder, "dp2", ["official 2"], batch=batch, steps=1)
        ((second,),) = take(
            gloo_pools,
            folder,
            "cp2",
            ["official 2"],
            batch=batch,
            steps=1,
            state_before=first.state,
        )
        assert ids_of(second) - ids_of([first])
        assert not problems(folder, "official 2", second)


@pytest.mark.parametrize(
    ("fault", "mode"),
    [("group", "official 2"), ("exchange", "official 2"), ("exchange", "sqrt_tokens")],
)
def test_a_wrong_denominator_is_noticed(
    gloo_pools: Any, folder: Path, fault: str, mode: str
) -> None:
    """The mutation: a group that counts one label token too many, or ranks that do not exchange their counts."""
    ((ranks,),) = take(gloo_pools, folder, "dp2", [mode], steps=1, fault=fault)
    found = problems(folder, mode, ranks)
    assert any("loss" in line for line in found)
    assert len(found) > 20, "nearly every parameter"


def test_settings_differ(folder: Path) -> None:
    """Else one of them could stand for another."""
    ids = tuple(sorted(name for name, _ in in_data_order(folder)[:12]))
    losses = {mode: expected(folder, mode, ids)[0] for mode in MODES}
    for (_, a), (_, b) in itertools.combinations(losses.items(), 2):
        assert abs(a / b - 1) > 100 * LOSS_RTOL
