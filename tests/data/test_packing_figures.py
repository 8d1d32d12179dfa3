# SPDX-License-Identifier: Apache-2.0
"""What the packer promises on realistic sizes: fill, look-ahead, size of the state, even load. Fixed seeds."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import BatchConfig, RunConfig
from megatron_eve.data.plan.lengths import SampleLengths
from megatron_eve.data.plan.packing import Item, PackCost, PackShape, PlannedPack
from megatron_eve.data.plan.stream_packer import MAX_POOL
from tools.bench.packing import (
    RANKS,
    balance,
    decoder_cost,
    fill,
    made_up_lengths,
    make_plan,
    plan_epoch,
    training_cost,
)
from tools.bench.size_mixes import REALISTIC

COUNT = 24_000
PACKS = BatchConfig(unit="packs", size=RANKS)


def lengths_of(name: str) -> SampleLengths:
    return made_up_lengths(REALISTIC[name], count=COUNT, seed=1)


def in_order_of_arrival(lengths: SampleLengths, shape: PackShape) -> list[PlannedPack]:
    """Packs without any choice: the next sample, until it does not fit."""
    packs: list[list[Item]] = [[]]
    columns = (np.arange(COUNT), lengths.num_vision, lengths.num_text)
    for item in map(Item, *(column.tolist() for column in columns)):
        vision, text = (sum(i[field] for i in packs[-1]) for field in (1, 2))
        if not shape.fits(vision + item.num_vision, text + item.num_text):
            packs.append([])
        packs[-1].append(item)
    return [tuple(pack) for pack in packs]


@pytest.mark.parametrize("cost_of", [training_cost, lambda c: decoder_cost(c.model)])
@pytest.mark.parametrize("name", REALISTIC)
def test_a_realistic_epoch(name: str, cost_of: Callable[[RunConfig], PackCost]) -> None:
    """128 data-parallel ranks, one pack each a step: the hardest case, as nothing evens out within a rank."""
    config = load_recipe(REALISTIC[name].recipe)
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    assert (shape.pack_tokens, shape.align) == (8192 if "800" in name else 16384, 128)
    lengths, cost = lengths_of(name), cost_of(config)
    epoch = plan_epoch(
        config, lengths=lengths, cost=cost
    )  # every sample exactly once, or it raises
    assert epoch.look_ahead <= MAX_POOL == 1024
    assert epoch.state_bytes <= 1_000_000
    assert fill(epoch.packs, pack_tokens=shape.pack_tokens) >= 0.99
    ratio = balance(epoch.packs, per_rank=1, dealt_by=cost, cost=cost, shape=shape)
    assert ratio["steps"] >= 8
    assert ratio["mean"] >= 0.985
    naive = in_order_of_arrival(lengths, shape)
    assert fill(naive, pack_tokens=shape.pack_tokens) < 0.98
    worse = balance(naive, per_rank=1, dealt_by=cost, cost=cost, shape=shape)
    assert 1 - worse["mean"] > 2 * (1 - ratio["mean"])


def test_a_large_pool_continues_exactly() -> None:
    name = "conversations, 1600^2"
    config, lengths = load_recipe(REALISTIC[name].recipe), lengths_of(name)
    plan = make_plan(config, lengths=lengths, batch=PACKS, cost=training_cost(config))
    plan.next_step()
    state = json.dumps(plan.state_dict())
    resumed = make_plan(config, lengths=lengths, batch=PACKS, cost=training_cost(config))
    resumed.load_state_dict(json.loads(state))
    assert len(json.loads(state)["pool"]) > 600
    assert [resumed.next_step() for _ in range(3)] == [plan.next_step() for _ in range(3)]


def test_packs_do_not_depend_on_the_step() -> None:
    """So a step of twice the size is two steps."""
    name = "captions, 800^2"
    config, lengths = load_recipe(REALISTIC[name].recipe), lengths_of(name)
    small = make_plan(
        config,
        lengths=lengths,
        batch=BatchConfig(unit="packs", size=32),
        cost=training_cost(config),
    )
    large = make_plan(
        config,
        lengths=lengths,
        batch=BatchConfig(unit="packs", size=64),
        cost=training_cost(config),
    )
    packs = [[i._replace(place=0) for i in p] for p in small.next_step() + small.next_step()]
    assert packs == [[i._replace(place=0) for i in p] for p in large.next_step()]
