# SPDX-License-Identifier: Apache-2.0
"""The pack plan on realistic sizes: fill, speed, state, look-ahead, and how evenly 128 data-parallel ranks are loaded.

    python -m tools.bench.packing --out runs/bench

For every mix of size_mixes.py one epoch is planned as the trainer plans it, with batch.unit=packs and one, two and
four packs for each of the ranks; repeats are interleaved over the mixes, times are CPU seconds of one process and
their median counts. Balance is mean / max over the ranks of the step's cost: the mean over the steps and the 5th
percentile, under two costs, each with packs that were planned by it:
  training  what the trainer plans by (PackCost.of_model): forward and backward, frozen branches cheaper, output layer;
  decoder   the decoder layers alone: both modalities cost the same, causal attention half of the square.
The trainer's packs under the second cost are in the JSON, too (`training_packs_by_decoder_cost`).
A last table has the recipes as they are, with batch.unit=samples, on their own number of ranks.
Writes packing.json; prints Markdown.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eve.command import end_with
from megatron_eve.config.decoder import decoder_layer
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import BatchConfig, ModelConfig, RunConfig
from megatron_eve.data.plan.lengths import SampleLengths
from megatron_eve.data.plan.order import PackPlan, SampleOrder
from megatron_eve.data.plan.packing import PackCost, PackShape, PlannedPack, deal
from megatron_eve.data.read.shards import ShardTable
from tools.bench.report import add_output_options, run_benchmark
from tools.bench.size_mixes import REALISTIC, STRESS, SizeMix, draw

RANKS = 128
PACKS_PER_RANK = (1, 2, 4)
MIN_SAMPLES = 12_000


@dataclasses.dataclass(slots=True)
class Epoch:
    """One planned epoch."""

    packs: list[PlannedPack]  # in order; full steps and the epoch's last, shorter one
    plan_s: float  # CPU seconds of the plan
    deal_s: float  # CPU seconds of dealing to the ranks, one pack each
    state_bytes: int  # the largest state after a step, as JSON
    look_ahead: int  # the largest number of samples in the pool after a step


def decoder_cost(model: ModelConfig) -> PackCost:
    """Multiply-adds of a decoder layer's forward: every token costs the same, causal attention half of the square."""
    layer = decoder_layer(model)
    linear = sum(one.weights for one in layer.linears)
    return PackCost(
        per_vision=linear, per_text=linear, per_text_label=0, per_square=layer.query_width
    )


def training_cost(config: RunConfig) -> PackCost:
    """The trainer's own cost."""
    return PackCost.of_model(config.model, trainable=config.stage.trainable)


def made_up_lengths(mix: SizeMix, *, count: int, seed: int) -> SampleLengths:
    """Samples drawn from a mix; every text token carries a label, as training_cost() takes it."""
    num_vision, num_text = draw(mix, count=count, seed=seed)
    return SampleLengths(num_vision, num_text, num_labels=num_text, unfit={})


def make_plan(
    config: RunConfig, *, lengths: SampleLengths, batch: BatchConfig, cost: PackCost
) -> PackPlan:
    """The recipe's plan over made-up lengths; shards of 4,096 samples that are not on disk."""
    count = lengths.num_text.size
    begins = np.unique(np.append(np.arange(0, count, 4096), count))
    table = ShardTable(
        folders=(Path("none"),),
        readers=(None,) * (begins.size - 1),
        shard_begins=begins,
        source_shards=np.array([0, begins.size - 1], np.int64),
    )
    return PackPlan(
        order=SampleOrder(table=table, lengths=lengths, data=config.data),
        lengths=lengths,
        shape=PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align),
        cost=cost,
        batch=batch,
        pool_packs=config.data.open_bins,
    )


def plan_epoch(config: RunConfig, *, lengths: SampleLengths, cost: PackCost) -> Epoch:
    """Plan and deal one epoch, step by step. Raises AssertionError if a sample is not in it exactly once."""
    batch = BatchConfig(unit="packs", size=RANKS)
    plan, new = (make_plan(config, lengths=lengths, batch=batch, cost=cost) for _ in range(2))
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    result = Epoch([], 0.0, 0.0, 0, 0)
    count, planned = lengths.num_text.size, 0
    plan.next_step()  # the epoch's shuffle is made once; it is streaming's, not the packer's
    plan.load_state_dict(new.state_dict())
    while planned < count:
        begin = time.process_time()
        step = plan.next_step()
        middle = time.process_time()
        deal(step, data_size=RANKS, cost=cost, shape=shape)
        result.deal_s += time.process_time() - middle
        result.plan_s += middle - begin
        state = plan.state_dict()
        result.state_bytes = max(result.state_bytes, len(json.dumps(state)))
        result.look_ahead = max(result.look_ahead, len(state["pool"]))
        ends = planned + np.cumsum([len(pack) for pack in step])
        result.packs += step[
            : int(np.searchsorted(ends, count)) + 1
        ]  # the rest is the next epoch's
        planned = int(ends[-1])
    seen = np.array([item.sample for pack in result.packs for item in pack])
    assert np.array_equal(np.sort(seen), np.arange(count)), "every sample exactly once"
    return result


def fill(packs: Sequence[PlannedPack], *, pack_tokens: int) -> float:
    """Real tokens as a fraction of all tokens."""
    return sum(item.num_tokens for pack in packs for item in pack) / (len(packs) * pack_tokens)


def balance(
    packs: Sequence[PlannedPack],
    *,
    per_rank: int,
    dealt_by: PackCost,
    cost: PackCost,
    shape: PackShape,
) -> dict[str, float]:
    """mean / max over the ranks of the cost of a step: mean over the full steps, and the 5th percentile."""
    size = RANKS * per_rank
    ratios: list[float] = []
    for begin in range(0, len(packs) - size + 1, size):
        hands = deal(packs[begin : begin + size], data_size=RANKS, cost=dealt_by, shape=shape)
        totals = [sum(cost.of(pack, shape=shape) for pack in hand) for hand in hands]
        ratios.append(statistics.fmean(totals) / max(totals))
    mean, p5 = statistics.fmean(ratios), float(np.quantile(ratios, 0.05))
    return {"mean": mean, "p5": p5, "steps": len(ratios)}


def describe(mix: SizeMix, *, lengths: SampleLengths, epochs: Sequence[Epoch]) -> dict[str, Any]:
    """All figures of one mix from its repeats."""
    config = load_recipe(mix.recipe)
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    training, decoder = training_cost(config), decoder_cost(config.model)
    packs, count = epochs[0].packs, lengths.num_text.size
    assert all(epoch.packs == packs for epoch in epochs), "every repeat plans the same packs"
    by_decoder = plan_epoch(config, lengths=lengths, cost=decoder).packs
    measured = {
        "training": (packs, training, training),
        "decoder": (by_decoder, decoder, decoder),
        "training_packs_by_decoder_cost": (packs, training, decoder),
    }
    tokens = lengths.num_vision + lengths.num_text
    plan_s = statistics.median(epoch.plan_s for epoch in epochs)
    both_s = statistics.median(epoch.plan_s + epoch.deal_s for epoch in epochs)
    return {
        "mix": dataclasses.asdict(mix),
        "pack_tokens": shape.pack_tokens,
        "mean_tokens": float(tokens.mean()),
        "largest_sample_tokens": int(tokens.max()),
        "fill": fill(packs, pack_tokens=shape.pack_tokens),
        "fill_planned_by_decoder_cost": fill(by_decoder, pack_tokens=shape.pack_tokens),
        "samples_per_s": count / plan_s,
        "samples_per_s_with_deal": count / both_s,
        "plan_s": [epoch.plan_s for epoch in epochs],
        "deal_s": [epoch.deal_s for epoch in epochs],
        "state_bytes": max(epoch.state_bytes for epoch in epochs),
        "look_ahead": max(epoch.look_ahead for epoch in epochs),
        "balance": {
            name: {
                str(n): balance(some, per_rank=n, dealt_by=dealt_by, cost=cost, shape=shape)
                for n in PACKS_PER_RANK
            }
            for name, (some, dealt_by, cost) in measured.items()
        },
    }


def as_the_recipe_is(mix: SizeMix, *, lengths: SampleLengths) -> dict[str, Any]:
    """Fill with batch.unit=samples on the recipe's own data-parallel ranks, padding packs included."""
    config = load_recipe(mix.recipe)
    ranks = config.parallel.data
    plan = make_plan(config, lengths=lengths, batch=config.batch, cost=training_cost(config))
    steps = [plan.next_step() for _ in range(lengths.num_text.size // config.batch.size)]
    packs = list(itertools.chain(*steps))
    dealt = sum(len(step) + -len(step) % ranks for step in steps)
    return {
        "recipe": config.recipe,
        "samples_per_step": config.batch.size,
        "ranks": ranks,
        "packs_per_step": len(packs) / len(steps),
        "packs_per_rank": dealt / len(steps) / ranks,
        "fill_of_packs": fill(packs, pack_tokens=config.data.pack_tokens),
        "fill": fill(packs, pack_tokens=config.data.pack_tokens) * len(packs) / dealt,
    }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as tables."""
    lines = [
        f"| sizes | pack | fill | samples/s | with dealing | state, bytes | look-ahead | mean/max over {RANKS} ranks, "
        "training cost: 1, 2, 4 packs each (p5 of 1) | the same, decoder cost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        ratios = []
        for cost in ("training", "decoder"):
            means = ", ".join(f"{one['balance'][cost][str(n)]['mean']:.4f}" for n in PACKS_PER_RANK)
            ratios.append(f"{means} ({one['balance'][cost]['1']['p5']:.4f})")
        lines.append(
            f"| {one['sizes']} | {one['pack_tokens']:,} | {one['fill']:.4f} | {one['samples_per_s']:,.0f} | "
            f"{one['samples_per_s_with_deal']:,.0f} | {one['state_bytes']:,} | {one['look_ahead']:,} | "
            + " | ".join(ratios)
            + " |"
        )
    lines += [
        "",
        "| recipe as it is | sizes | samples a step | ranks | packs a step | packs a rank | fill of packs | "
        "fill with padding packs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in rows:
        recipe = one["as_the_recipe_is"]
        lines.append(
            f"| {recipe['recipe']} | {one['sizes']} | {recipe['samples_per_step']:,} | {recipe['ranks']} | "
            f"{recipe['packs_per_step']:.1f} | {recipe['packs_per_rank']:.2f} | {recipe['fill_of_packs']:.4f} | "
            f"{recipe['fill']:.4f} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.packing",
        description="Measure the pack plan on made-up sizes. Writes DIR/packing.json, prints Markdown.",
        epilog="Example: python -m tools.bench.packing --out runs/bench",
    )
    add_output_options(parser, name="packing")
    parser.add_argument("--samples", type=int, default=150_000, help="samples of each mix's epoch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.samples < MIN_SAMPLES or arguments.repeats < 1:
        parser.error(
            f"--samples must be at least {MIN_SAMPLES:,} (a step of {PACKS_PER_RANK[-1]} packs for each of "
            f"{RANKS} ranks), --repeats at least 1"
        )
    return arguments


def _measure_mixes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    mixes = {**REALISTIC, **STRESS}
    lengths = {
        name: made_up_lengths(mix, count=arguments.samples, seed=arguments.seed)
        for name, mix in mixes.items()
    }
    epochs: dict[str, list[Epoch]] = {name: [] for name in mixes}
    for _ in range(arguments.repeats):
        for name, mix in mixes.items():
            config = load_recipe(mix.recipe)
            epoch = plan_epoch(config, lengths=lengths[name], cost=training_cost(config))
            epochs[name].append(epoch)
    return [
        {"sizes": name}
        | describe(mix, lengths=lengths[name], epochs=epochs[name])
        | {"as_the_recipe_is": as_the_recipe_is(mix, lengths=lengths[name])}
        for name, mix in mixes.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    arguments = parse(argv)
    return run_benchmark(
        arguments, name="packing", measure=lambda: _measure_mixes(arguments), table=markdown
    )


if __name__ == "__main__":
    end_with(main)
