# SPDX-License-Identifier: Apache-2.0
"""The stream packer: exactly once, exact fit, nobody waits for ever, the pool is the whole state."""

import itertools

import numpy as np
import pytest

from megatron_eve.data.plan.packing import Item, PackCost, PackShape, PlannedPack
from megatron_eve.data.plan.stream_packer import MAX_POOL, StreamPacker

COST = PackCost(per_vision=1000, per_text=1000, per_text_label=80, per_square=1)
SQUARES = PackCost(per_vision=0, per_text=0, per_text_label=0, per_square=1)
FLAT = PackCost(per_vision=1, per_text=1, per_text_label=0, per_square=0)


def packer_of(
    shape: PackShape, *, cost: PackCost = COST, max_tokens: int = 1 << 40
) -> StreamPacker:
    return StreamPacker(shape=shape, cost=cost, max_tokens=max_tokens)


def add(packer: StreamPacker, items: list[Item]) -> None:
    samples, num_vision, num_text = np.array(items, np.int64).reshape(-1, 4).T[:3]
    packer.add(samples, num_vision=num_vision, num_text=num_text)


def random_items(seed: int, shape: PackShape, *, count: int = 300) -> list[Item]:
    """Text alone, image alone, one token, as large as a pack: whatever fits."""
    rng = np.random.default_rng(seed)
    largest = shape.pack_tokens - shape.align
    items: list[Item] = []
    while len(items) < count:
        scale = rng.choice([1, largest // 8 + 1, largest // 2 + 1, largest])
        vision, text = rng.integers(0, scale + 1, 2).tolist()
        vision, text = rng.choice([0, 1]) * vision, rng.choice([0, 1]) * text
        if vision + text and shape.fits(vision, text):
            items.append(Item(len(items), int(vision), int(text)))
    return items


def run(packer: StreamPacker, items: list[Item]) -> list[PlannedPack]:
    """Pack them all, the pool as full as it gets."""
    packs: list[PlannedPack] = []
    position = 0
    while position < len(items) or len(packer):
        ahead = items[position : position + MAX_POOL]
        count = packer.accepts(np.array([item.num_tokens for item in ahead], np.int64))
        add(packer, ahead[:count])
        position += count
        packs.append(packer.take())
    return packs


@pytest.mark.parametrize(
    "shape",
    [
        PackShape(pack_tokens=64, align=8),
        PackShape(pack_tokens=64, align=32),
        PackShape(pack_tokens=40, align=1),
        PackShape(pack_tokens=2048, align=128),
    ],
    ids=lambda shape: f"{shape.pack_tokens}-{shape.align}",
)
@pytest.mark.parametrize("max_packs", [1, 4, 1000])
def test_any_samples_are_packed_once_and_fit(shape: PackShape, max_packs: int) -> None:
    for seed in range(5):
        items = random_items(seed, shape)
        packs = run(packer_of(shape, max_tokens=max_packs * shape.pack_tokens), items)
        assert sorted(item for pack in packs for item in pack) == items
        for pack in packs:
            assert pack
            assert shape.fits(sum(i.num_vision for i in pack), sum(i.num_text for i in pack))
            assert list(pack) == sorted(pack), "order of arrival"


def test_the_oldest_is_in_the_next_pack() -> None:
    shape = PackShape(pack_tokens=2048, align=128)
    packer = packer_of(shape)
    add(packer, random_items(0, shape))
    while len(packer):
        oldest = packer.samples[0]
        assert packer.take()[0].sample == oldest


def test_the_pool_takes_as_much_as_it_may() -> None:
    shape = PackShape(pack_tokens=64, align=8)
    packer = packer_of(shape, max_tokens=100)
    assert packer.accepts(np.full(9, 30)) == 3
    assert packer.accepts(np.array([200, 1])) == 1, "an empty pool takes one in any case"
    add(packer, [Item(0, 30, 10)])
    assert packer.accepts(np.full(9, 30)) == 2
    assert packer.accepts(np.array([61, 1])) == 0
    many = packer_of(shape)
    assert many.accepts(np.ones(5000, np.int64)) == MAX_POOL
    add(many, [Item(i, 0, 1) for i in range(MAX_POOL - 2)])
    assert many.accepts(np.ones(5000, np.int64)) == 2


def test_the_pool_is_the_whole_state() -> None:
    shape = PackShape(pack_tokens=512, align=32)
    items = random_items(1, shape)
    packer = packer_of(shape)
    add(packer, items)
    for _ in range(20):
        resumed = packer_of(shape)
        for index in packer.samples.tolist():  # one by one: how they came does not matter
            add(resumed, [items[index]])
        expected = packer.take()
        assert resumed.take() == expected
        assert resumed.samples.tolist() == packer.samples.tolist()


def test_an_ending_that_fills_both_segments_is_found() -> None:
    """300 vision and 84 text tokens are there; of the pairs that fill the pack one has segments that fit."""
    shape = PackShape(pack_tokens=1024, align=128)
    packer = packer_of(shape, cost=FLAT)
    decoys = [Item(1 + i, 250 + i, 70 - i) for i in range(20)]  # any two of them: 640 tokens
    add(packer, [Item(0, 300, 84), *decoys, Item(30, 400, 0), Item(31, 68, 172)])
    assert not shape.fits(300 + 250 + 251, 84 + 70 + 69), "decoys fill the pack by tokens alone"
    assert packer.take() == (Item(0, 300, 84), Item(30, 400, 0), Item(31, 68, 172))


def test_packs_cost_the_same_where_samples_do_not() -> None:
    """Long and short samples in random order, against packs that take them in that order."""
    shape = PackShape(pack_tokens=4096, align=128)
    cost = SQUARES
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(300, 500, 200), rng.integers(80, 120, 600)])
    items = [Item(i, n // 2, n - n // 2) for i, n in enumerate(rng.permutation(lengths).tolist())]
    packer = packer_of(shape, cost=cost)
    add(packer, items)
    costs = [cost.of(packer.take(), shape=shape) for _ in range(25)]
    bounds = np.searchsorted(np.cumsum([i.num_tokens for i in items]), 3800 * np.arange(26))
    naive = [cost.of(tuple(items[a:b]), shape=shape) for a, b in itertools.pairwise(bounds)]
    assert np.std(costs) < 0.3 * np.std(naive)


def outlier(num_text: int) -> tuple[PlannedPack, PlannedPack]:
    """The pack begun by a sample of so many tokens, and the next; the 64 oldest others are longer than the average."""
    shape = PackShape(pack_tokens=16384, align=128)
    packer = packer_of(shape, cost=SQUARES)
    middle = [Item(1 + i, 190, 190) for i in range(300)]
    short = [Item(500 + i, 27, 27) for i in range(400)]
    add(packer, [Item(0, 0, num_text), *middle, *short])
    return packer.take(), packer.take()


def test_an_outlier_finds_its_counterweight_anywhere_in_the_pool() -> None:
    pack, following = outlier(2000)
    assert sum(item.sample >= 500 for item in pack) > 100
    assert sum(item.num_tokens for item in pack) > 0.97 * 16384
    shape = PackShape(pack_tokens=16384, align=128)
    assert SQUARES.of(pack, shape=shape) < 1.1 * SQUARES.of(following, shape=shape)


def test_a_sample_dearer_than_a_pack_stays_alone() -> None:
    pack, following = outlier(5000)
    assert pack == (Item(0, 0, 5000),)
    assert sum(item.num_tokens for item in following) > 0.97 * 16384


def test_without_differences_in_cost_only_fill_counts() -> None:
    shape = PackShape(pack_tokens=16384, align=128)
    packer = packer_of(shape, cost=FLAT)
    add(packer, [Item(0, 0, 5000), *(Item(1 + i, 190, 190) for i in range(300))])
    assert sum(item.num_tokens for item in packer.take()) > 0.97 * 16384
