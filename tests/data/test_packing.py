# SPDX-License-Identifier: Apache-2.0
"""The packers: exact fit, exactly once, fill on realistic sizes; even and deterministic dealing."""

import dataclasses
import math

import numpy as np
import pytest

from megatron_eve.config.schema import SplitConfig, TrainableGroup
from megatron_eve.data.plan.packing import (
    Item,
    PackCost,
    PackShape,
    PlannedPack,
    deal,
    pack_batch,
)
from megatron_eve.data.read.image_size import train_size
from megatron_eve.data.sample import image_token_count
from megatron_eve.errors import ConfigError
from tests.data.conftest import MODEL

COST = PackCost(per_vision=1000, per_text=1000, per_text_label=0, per_square=1)


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
def test_realistic_batches_fill_packs(edge: int, pack_tokens: int, median_text: int) -> None:
    shape = PackShape(pack_tokens=pack_tokens, align=128)
    batch = web_items(1024, edge=edge, seed=edge, median_text=median_text)
    packs = pack_batch(batch, shape=shape)
    assert fill(packs, shape) >= 0.97
    check(packs, batch, shape)


def small_items(seed: int, shape: PackShape) -> list[Item]:
    rng = np.random.default_rng(seed)
    sizes = zip(rng.integers(0, 40, 200).tolist(), rng.integers(1, 25, 200).tolist(), strict=True)
    return [Item(i, v, t) for i, (v, t) in enumerate(sizes) if shape.fits(v, t)]


@pytest.mark.parametrize("seed", range(10))
def test_batch_is_best_fit_longest_first(seed: int) -> None:
    """Against the definition: every pack looked at for every item."""
    shape = PackShape(pack_tokens=64, align=8)
    items = small_items(seed, shape)
    packs: list[list[Item]] = []
    for item in sorted(items, key=lambda i: -i.num_tokens):
        takers = [p for p in packs if shape.fits(*np.sum([*p, item], axis=0)[1:3].tolist())]
        if takers:
            max(takers, key=lambda p: sum(i.num_tokens for i in p)).append(item)
        else:
            packs.append([item])
    found = pack_batch(items, shape=shape)
    assert {frozenset(pack) for pack in found} == {frozenset(pack) for pack in packs}
    check(found, items, shape)


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


def test_cost_counts_padding_by_segment_and_labels_by_token() -> None:
    shape = PackShape(pack_tokens=64, align=8)
    cost = PackCost(per_vision=10, per_text=100, per_text_label=1000, per_square=0)
    assert cost.of((), shape=shape) == 8 * 10 + 56 * 100
    assert cost.of((Item(0, 9, 5),), shape=shape) == 16 * 10 + 48 * 100 + 5 * 1000


@pytest.mark.parametrize(
    ("trainable", "dense", "passes"),
    [
        (("patch_embedding",), True, (2, 2, 2)),
        (("patch_embedding", "text"), True, (3, 3, 3)),  # a dense decoder is all text weights
        (("patch_embedding", "vision"), False, (3, 2, 2)),
        (("patch_embedding", "vision", "text"), False, (3, 3, 3)),
    ],
)
def test_cost_of_the_model_counts_passes(
    trainable: tuple[TrainableGroup, ...], dense: bool, passes: tuple[int, int, int]
) -> None:
    split = SplitConfig(norm=not dense, attention=not dense, ffn=not dense)
    model = dataclasses.replace(MODEL, split=split)
    # hidden 64: query and output 64 x 64, key and value 64 x 32, three matrices 64 x 128; vocabulary, 2 layers
    linear, output = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128, 64 * 151_680 // 2
    vision, text, label = passes
    assert PackCost.of_model(model, trainable=trainable) == PackCost(
        per_vision=vision * linear,
        per_text=text * linear,
        per_text_label=label * output,
        per_square=3 * 64,
    )
