# SPDX-License-Identifier: Apache-2.0
"""The packers: exact fit, exactly once, fill on realistic sizes; even and deterministic dealing."""

import math

import numpy as np
import pytest

from megatron_eve.data.image_size import train_size
from megatron_eve.data.packing import (
    Item,
    OpenBins,
    PackCost,
    PackShape,
    PlannedPack,
    deal,
    pack_batch,
)
from megatron_eve.data.sample import image_token_count
from megatron_eve.errors import ConfigError

COST = PackCost(per_token=1000.0, per_token_squared=1.0)


def web_items(count: int, *, edge: int, seed: int, median_text: int) -> list[Item]:
    """Photographs of web-like sizes with captions; a tenth text-only. Log-normal, as in LAION-like sets."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        area, aspect = math.exp(rng.normal(math.log(0.5e6), 0.9)), math.exp(rng.normal(0.12, 0.38))
        size = train_size(int(math.sqrt(area / aspect)), int(math.sqrt(area * aspect)), edge=edge)
        vision = 0 if rng.random() < 0.1 else image_token_count(*size)
        items.append(
            Item(i, vision, int(np.clip(rng.lognormal(math.log(median_text), 0.7), 5, 2000)))
        )
    return items


def fill(packs: list[PlannedPack], shape: PackShape) -> float:
    return sum(i.num_tokens for pack in packs for i in pack) / (len(packs) * shape.pack_tokens)


def check(packs: list[PlannedPack], items: list[Item], shape: PackShape) -> None:
    """Every item exactly once, every pack fits with both segments padded."""
    assert sorted(item for pack in packs for item in pack) == sorted(items)
    for pack in packs:
        vision = max(math.ceil(sum(i.num_vision for i in pack) / shape.align), 1)
        text = max(math.ceil(sum(i.num_text for i in pack) / shape.align), 1)
        assert (vision + text) * shape.align <= shape.pack_tokens


@pytest.mark.parametrize(
    ("edge", "pack_tokens", "median_text"), [(800, 8192, 60), (800, 16384, 150), (1600, 16384, 150)]
)
def test_realistic_mixes_fill_packs(edge: int, pack_tokens: int, median_text: int) -> None:
    shape = PackShape(pack_tokens=pack_tokens, align=128)
    items = web_items(6000, edge=edge, seed=edge, median_text=median_text)
    bins = OpenBins(shape=shape, max_open=16)
    for item in items:
        bins.put(item)
    assert fill(bins.ready, shape) >= 0.97
    bins.flush()
    check(bins.ready, items, shape)
    batch = items[:1024]
    packs = pack_batch(batch, shape=shape)
    assert fill(packs, shape) >= 0.97
    check(packs, batch, shape)


@pytest.mark.parametrize("seed", range(10))
def test_any_items_are_packed_once_and_fit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = PackShape(pack_tokens=64, align=8)
    items = [
        Item(i, int(v), int(t))
        for i, (v, t) in enumerate(
            zip(rng.integers(0, 40, 200), rng.integers(1, 25, 200), strict=True)
        )
        if shape.fits(int(v), int(t))
    ]
    check(pack_batch(items, shape=shape), items, shape)
    bins = OpenBins(shape=shape, max_open=int(rng.integers(1, 5)))
    for item in items:
        bins.put(item)
        assert len(bins.open) <= bins.max_open
    bins.flush()
    check(bins.ready, items, shape)


def test_fit_is_exact_at_the_edge() -> None:
    shape = PackShape(pack_tokens=32, align=8)
    assert shape.fits(24, 8)
    assert shape.fits(0, 24)  # the vision segment takes one block even without vision
    assert not shape.fits(0, 25)
    assert not shape.fits(17, 9)
    assert pack_batch([Item(0, 8, 4), Item(1, 8, 4)], shape=shape) == [
        (Item(0, 8, 4), Item(1, 8, 4))
    ]


def test_batch_keeps_the_given_order() -> None:
    shape = PackShape(pack_tokens=32, align=8)
    items = [Item(9, 8, 2), Item(3, 16, 4), Item(5, 16, 8), Item(1, 0, 4)]
    packs = pack_batch(items, shape=shape)
    places = {item: place for place, item in enumerate(items)}
    assert [sorted(pack, key=places.__getitem__) for pack in packs] == [list(p) for p in packs]
    assert sorted(packs, key=lambda pack: places[pack[0]]) == packs


@pytest.mark.parametrize(("pack_tokens", "align"), [(100, 8), (8, 8), (64, 0)])
def test_impossible_shapes_are_refused(pack_tokens: int, align: int) -> None:
    with pytest.raises(
        ConfigError, match=f"pack_tokens={pack_tokens} must be a multiple of data.al"
    ):
        PackShape(pack_tokens=pack_tokens, align=align)


@pytest.mark.parametrize("data_size", [1, 2, 3, 8])
def test_dealing_pads_balances_and_loses_nothing(data_size: int) -> None:
    shape = PackShape(pack_tokens=8192, align=128)
    packs = pack_batch(web_items(700, edge=1600, seed=1, median_text=100), shape=shape)
    hands = deal(packs, data_size=data_size, cost=COST, shape=shape)
    dealt = [pack for hand in hands for pack in hand]
    assert sorted(pack for pack in dealt if pack) == sorted(packs)
    assert dealt.count(()) == -len(packs) % data_size
    assert len({len(hand) for hand in hands}) == 1
    totals = [sum(COST.of(pack, shape=shape) for pack in hand) for hand in hands]
    real_hands = [t for t, hand in zip(totals, hands, strict=True) if () not in hand]
    assert max(real_hands) <= 1.05 * min(real_hands)
    places = {pack: place for place, pack in enumerate(packs)}
    for hand in hands:
        real = [places[pack] for pack in hand if pack]
        assert real == sorted(real)


def test_few_packs_for_many_ranks() -> None:
    shape = PackShape(pack_tokens=64, align=8)
    hands = deal([(Item(0, 0, 8),)], data_size=4, cost=COST, shape=shape)
    assert [len(hand) for hand in hands] == [1, 1, 1, 1]
    assert sum(hand == [()] for hand in hands) == 3


def test_cost_counts_the_square_of_each_sample() -> None:
    shape = PackShape(pack_tokens=64, align=8)
    one, two = (Item(0, 20, 20),), (Item(0, 10, 10), Item(1, 10, 10))
    assert COST.of(one, shape=shape) - COST.of((), shape=shape) == 1600
    assert COST.of(two, shape=shape) - COST.of((), shape=shape) == 800
