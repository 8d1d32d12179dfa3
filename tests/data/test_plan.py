# SPDX-License-Identifier: Apache-2.0
"""The plan: order, shares, steps, and a state that continues exactly. No pixels, no text: lengths are made up."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_eve.config.schema import BatchConfig
from megatron_eve.data.plan.lengths import SampleLengths
from megatron_eve.data.plan.order import PackPlan, SampleOrder
from megatron_eve.data.plan.packing import PackCost, PackShape, PlannedPack
from megatron_eve.data.read.quarantine import Quarantined
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.errors import ConfigError, DataError
from tests.data.conftest import data_config

SHAPE = PackShape(pack_tokens=256, align=16)
COST = PackCost(per_vision=1000, per_text=1000, per_text_label=100, per_square=3)


def table_of(*shards: list[int]) -> ShardTable:
    """A table of so many sources with shards of so many samples; nothing on disk."""
    sizes = [size for source in shards for size in source]
    return ShardTable(
        folders=tuple(Path(f"source-{i}") for i in range(len(shards))),
        readers=(None,) * len(sizes),
        shard_begins=np.cumsum([0, *sizes], dtype=np.int64),
        source_shards=np.cumsum([0, *map(len, shards)], dtype=np.int64),
    )


def lengths_of(count: int, *, unfit: tuple[int, ...] = ()) -> SampleLengths:
    rng = np.random.default_rng(count)
    entries = {i: Quarantined(str(i), "", "empty_answer", "", "x.mds", i) for i in unfit}
    num_vision = rng.integers(0, 100, count, dtype=np.int32)
    num_text = rng.integers(5, 60, count, dtype=np.int32)
    return SampleLengths(num_vision, num_text, num_labels=num_text - 4, unfit=entries)


def order_of(table: ShardTable, lengths: SampleLengths, **changes: object) -> SampleOrder:
    data = data_config(table.folders, tokenizer=Path("none"), **changes)
    return SampleOrder(table=table, lengths=lengths, data=data)


def plan_of(
    unit: str = "packs",
    size: int = 5,
    *,
    pool_packs: int = 4,
    shape: PackShape = SHAPE,
    cost: PackCost = COST,
    **changes: object,
) -> PackPlan:
    table, lengths = table_of([30, 50, 20], [40]), lengths_of(140, unfit=(3, 100))
    return PackPlan(
        order=order_of(table, lengths, **changes),
        lengths=lengths,
        shape=shape,
        cost=cost,
        batch=BatchConfig(unit=unit, size=size),  # type: ignore[arg-type]
        pool_packs=pool_packs,
    )


def ids(step: list[PlannedPack]) -> list[int]:
    return [item.sample for pack in step for item in pack]


@pytest.mark.parametrize(("unit", "size"), [("samples", 9), ("packs", 5)])
def test_samples_of_a_step_are_numbered_in_data_order(unit: str, size: int) -> None:
    """0, 1, 2 ... over the packs of a step, in the order of the epoch, which is not the order of the packs; also over
    an epoch's end and after a resume, where the packer's pool comes from a state."""
    plan, other = (plan_of(unit, size, proportions=[99.0, 39.0]) for _ in range(2))
    rank = {sample: i for i, sample in enumerate(plan._order.epoch(0).tolist())}
    mixed, largest = 0, 0
    for number in range(60):
        state = json.loads(json.dumps(plan.state_dict()))
        step = plan.next_step()
        items = sorted((item for pack in step for item in pack), key=lambda item: item.place)
        assert [item.place for item in items] == list(range(len(items)))
        largest = max(largest, len(items))
        if plan.state_dict()["epoch"] == 0:
            ranks = [rank[item.sample] for item in items]
            assert ranks == sorted(ranks)
            mixed += ids(step) != [item.sample for item in items]
        if number % 7 == 3:
            other.load_state_dict(state)
            assert other.next_step() == step
    assert mixed > 3, "else the order of packs would do"
    assert largest <= plan.max_samples < 1000


def test_one_source_every_usable_sample_once_per_epoch() -> None:
    unfit = (0, 7, *range(30, 80), 99)  # the second shard has no usable sample at all
    order = order_of(table_of([30, 50, 20]), lengths_of(100, unfit=unfit))
    usable = sorted(set(range(100)) - set(unfit))
    epochs = [order.epoch(epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == usable for epoch in epochs)
    assert len(order) == len(usable)
    assert epochs[0] != epochs[1]
    assert epochs[0] != usable
    assert order.epoch(0).tolist() == epochs[0]


def test_seed_decides_the_order_and_the_fingerprint() -> None:
    table, lengths = table_of([30, 50]), lengths_of(80)
    one, same = order_of(table, lengths), order_of(table, lengths)
    other = order_of(table, lengths, seed=4)
    assert one.epoch(2).tolist() == same.epoch(2).tolist()
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.epoch(0).tolist() != other.epoch(0).tolist()


def test_proportions_share_out_the_epoch_and_sources_continue() -> None:
    table, lengths = table_of([40, 60], [50]), lengths_of(150)
    order = order_of(table, lengths, proportions=[1.0, 2.0])
    epochs = [order.epoch(epoch) for epoch in range(4)]
    for epoch in epochs:
        assert epoch.size == 150
        assert (epoch < 100).sum() == 50
        assert (epoch >= 100).sum() == 100
        assert 20 < (epoch[:75] >= 100).sum() < 75, "sources must be mixed within the epoch"
    first = np.concatenate([epoch[epoch < 100] for epoch in epochs])
    assert sorted(first[:100]) == list(range(100)), "every sample once before any twice"
    assert Counter(Counter(first.tolist()).values()) == {2: 100}


def test_block_smaller_than_a_shard_is_said(caplog: pytest.LogCaptureFixture) -> None:
    order_of(table_of([30, 50]), lengths_of(80), shuffle_block_size=70)
    assert not caplog.text
    order_of(table_of([30, 50]), lengths_of(80), shuffle_block_size=60)
    assert "data.shuffle_block_size=60 is too small to mix shards of 50 samples" in caplog.text


def test_source_without_proportion_is_left_out() -> None:
    order = order_of(table_of([40], [50]), lengths_of(90), proportions=[1.0, 0.0])
    assert (order.epoch(0) < 40).all()
    assert len(order) == 90


@pytest.mark.parametrize("proportions", [[0.0, 0.0], [1.0, -1.0]])
def test_impossible_proportions_are_refused(proportions: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources: proportions are"):
        order_of(table_of([4], [5]), lengths_of(9), proportions=proportions)


def test_sources_without_usable_samples_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"no sample fit for training; left out .*'empty_answer': 5"
    ):
        order_of(table_of([5]), lengths_of(5, unfit=tuple(range(5))))
    with pytest.raises(DataError, match="source-1: no sample fit for training, but proportion=1"):
        order_of(table_of([5], [2]), lengths_of(7, unfit=(5, 6)))


@pytest.mark.parametrize(("unit", "size"), [("samples", 9), ("packs", 5)])
def test_each_epoch_gives_each_sample_once(unit: str, size: int) -> None:
    plan = plan_of(unit, size, proportions=[99.0, 39.0])
    usable = sorted(set(range(140)) - {3, 100})
    seen: list[int] = []
    while len(seen) < 3 * 138 + 30:
        step = plan.next_step()
        seen += ids(step)
        count = sum(map(len, step)) if unit == "samples" else len(step)
        assert count == size
        for pack in step:
            assert SHAPE.fits(sum(i.num_vision for i in pack), sum(i.num_text for i in pack))
    for epoch in range(3):
        counts = Counter(seen[: 138 * (epoch + 1)])
        if unit == "packs":
            assert counts == dict.fromkeys(usable, epoch + 1), "packs never cross an epoch"
    counts = Counter(seen)
    assert set(counts) == set(usable)
    assert set(counts.values()) <= {3, 4}


def test_step_larger_than_an_epoch_crosses_it() -> None:
    counts = Counter(ids(plan_of("samples", 300, proportions=[99.0, 39.0]).next_step()))
    assert sorted(Counter(counts.values())) == [2, 3]
    assert sum(counts.values()) == 300


@pytest.mark.parametrize(("unit", "size"), [("samples", 9), ("packs", 5)])
def test_state_continues_exactly_and_survives_json(unit: str, size: int) -> None:
    plan = plan_of(unit, size)
    steps, states = [], [plan.state_dict()]
    for _ in range(40):
        steps.append(plan.next_step())
        states.append(json.loads(json.dumps(plan.state_dict())))
    for done in (0, 1, 13, 14, 15, 27, 39):
        resumed = plan_of(unit, size)
        resumed.load_state_dict(states[done])
        assert [resumed.next_step() for _ in range(40 - done)] == steps[done:]
    assert all(len(json.dumps(state)) < 1500 for state in states)


def test_state_of_another_plan_is_refused() -> None:
    state = plan_of().state_dict()
    changed = [
        plan_of(seed=4),
        plan_of(pool_packs=5),
        plan_of(cost=dataclasses.replace(COST, per_vision=1500)),
        plan_of(shape=PackShape(pack_tokens=512, align=16)),
        plan_of("samples"),
        plan_of(proportions=[1.0, 2.0]),
    ]
    for plan in changed:
        with pytest.raises(DataError, match=r"data state belongs to plan .*data\.seed"):
            plan.load_state_dict(state)
    by_samples = plan_of("samples", 9).state_dict()
    plan_of("samples", 17, pool_packs=7).load_state_dict(
        by_samples
    )  # nothing between steps depends on these


def test_impossible_batches_are_refused() -> None:
    for size, pool_packs in itertools.product((0, 1), (0, 1)):
        if (size, pool_packs) != (1, 1):
            with pytest.raises(
                ConfigError, match=rf"batch\.size={size} and .*data\.open_bins={pool_packs}"
            ):
                plan_of(size=size, pool_packs=pool_packs)


def test_lengths_decide_the_fingerprint() -> None:
    table, lengths = table_of([20]), lengths_of(20)
    longer = dataclasses.replace(lengths, num_text=lengths.num_text + 1)
    plans = [
        PackPlan(
            order=order_of(table, lengths),
            lengths=one,
            shape=SHAPE,
            cost=COST,
            batch=BatchConfig(unit="samples", size=3),
            pool_packs=1,
        )
        for one in (lengths, longer)
    ]
    assert plans[0].fingerprint != plans[1].fingerprint
