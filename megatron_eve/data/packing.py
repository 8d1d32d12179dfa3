# SPDX-License-Identifier: Apache-2.0
"""Which samples share a pack. Pure integer arithmetic on (vision tokens, text tokens); no pixels, no text.

A pack has T tokens in two segments, vision and text, each padded to a multiple of `align` and at least one `align`
(see sample.py). So samples fit together when ceil(sum of vision) + ceil(sum of text) <= T, which is checked exactly.
Three algorithms, all deterministic:
  pack_batch   best fit, longest first, for a set of samples that must be one step;
  OpenBins     online best fit over a stream with few open packs: fills as well, and big samples do not end up together,
               as they do with sorted buffers (fill 99.4-99.6% with 16 open packs, before alignment);
  deal         packs to data-parallel ranks, so that costs are even.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import ConfigError


class Item(NamedTuple):
    """A sample as the packer sees it: its global index in the shard table, and its tokens."""

    sample: int
    num_vision: int
    num_text: int

    @property
    def num_tokens(self) -> int:
        return self.num_vision + self.num_text


PlannedPack = tuple[Item, ...]
"""Samples of one pack in sequence order; empty: a pack of padding alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackShape:
    """What fits into a pack."""

    pack_tokens: int
    align: int

    def __post_init__(self) -> None:
        if self.align < 1 or self.pack_tokens % self.align or self.pack_tokens < 2 * self.align:
            raise ConfigError(
                f"data.pack_tokens={self.pack_tokens} must be a multiple of data.align={self.align} "
                "and at least twice as large (one block of vision, one of text)."
            )

    def segment(self, num_tokens: int) -> int:
        """Length of a segment that holds so many real tokens."""
        return max(-(-num_tokens // self.align), 1) * self.align

    def fits(self, num_vision: int, num_text: int) -> bool:
        return self.segment(num_vision) + self.segment(num_text) <= self.pack_tokens


@dataclass(slots=True)
class _Bin:
    items: list[Item] = field(default_factory=list)
    num_vision: int = 0
    num_text: int = 0

    def add(self, item: Item) -> None:
        self.items.append(item)
        self.num_vision += item.num_vision
        self.num_text += item.num_text

    @property
    def num_tokens(self) -> int:
        return self.num_vision + self.num_text


def _fullest_that_takes(bins: Sequence[_Bin], item: Item, *, shape: PackShape) -> int | None:
    """Position of the fullest bin with room for the item; the first one of several."""
    best, best_tokens = None, -1
    for position, candidate in enumerate(bins):
        if candidate.num_tokens > best_tokens and shape.fits(
            candidate.num_vision + item.num_vision, candidate.num_text + item.num_text
        ):
            best, best_tokens = position, candidate.num_tokens
    return best


def pack_batch(items: Sequence[Item], *, shape: PackShape) -> list[PlannedPack]:
    """Packs that hold exactly these items: best fit, longest first. Inside a pack, and pack by pack, the given order.

    Every item must fit into a pack of its own (plan.py leaves out those that do not)."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].num_tokens, i))
    bins: list[_Bin] = []
    places: list[list[int]] = []
    for i in order:
        position = _fullest_that_takes(bins, items[i], shape=shape)
        if position is None:
            position = len(bins)
            bins.append(_Bin())
            places.append([])
        bins[position].add(items[i])
        places[position].append(i)
    return [tuple(items[i] for i in members) for members in sorted(map(sorted, places))]


@dataclass(slots=True)
class OpenBins:
    """Online best fit: `put` items one by one, take finished packs from `ready`."""

    shape: PackShape
    max_open: int
    full_fraction: float = 0.99  # a bin this full is finished
    open: list[_Bin] = field(default_factory=list)
    ready: list[PlannedPack] = field(default_factory=list)

    def put(self, item: Item) -> None:
        """Put an item into the fullest open bin that takes it; finish bins that are full or too many."""
        position = _fullest_that_takes(self.open, item, shape=self.shape)
        if position is None:
            position = len(self.open)
            self.open.append(_Bin())
        chosen = self.open[position]
        chosen.add(item)
        if chosen.num_tokens >= self.full_fraction * self.shape.pack_tokens:
            self._finish(position)
        elif len(self.open) > self.max_open:
            self._finish(max(range(len(self.open)), key=lambda i: (self.open[i].num_tokens, -i)))

    def flush(self) -> None:
        """Finish every open bin, oldest first."""
        while self.open:
            self._finish(0)

    def load(self, *, open_items: Sequence[Sequence[Item]], ready: Sequence[PlannedPack]) -> None:
        """Put back what `open` and `ready` held."""
        self.open = []
        for items in open_items:
            self.open.append(_Bin())
            for item in items:
                self.open[-1].add(item)
        self.ready = list(ready)

    def _finish(self, position: int) -> None:
        self.ready.append(tuple(self.open.pop(position).items))


@dataclass(frozen=True, kw_only=True, slots=True)
class PackCost:
    """Relative time of a pack: T tokens through the linear layers, and in attention a square per sample."""

    per_token: float
    per_token_squared: float

    @classmethod
    def of_model(cls, model: ModelConfig) -> "PackCost":
        """Multiply-adds of one decoder layer; causal attention does half of the square."""
        query = model.num_attention_heads * model.head_dim
        key_value = 2 * model.num_kv_heads * model.head_dim
        projections = model.hidden_size * (query + key_value) + query * model.hidden_size
        return cls(
            per_token=projections + 3 * model.hidden_size * model.ffn_hidden_size,
            per_token_squared=float(query),
        )

    def of(self, pack: PlannedPack, *, shape: PackShape) -> float:
        squares = sum(item.num_tokens**2 for item in pack)
        return self.per_token * shape.pack_tokens + self.per_token_squared * squares


def deal(
    packs: Sequence[PlannedPack], *, data_size: int, cost: PackCost, shape: PackShape
) -> list[list[PlannedPack]]:
    """The packs of each data-parallel rank: as many for all (padding packs added), costs as even as greedy gets.

    Costliest first, each to the rank with the least so far that may still take one. Within a rank the packs keep their
    order in the step."""
    padded = [*packs, *([()] * (-len(packs) % data_size))]
    quota = len(padded) // data_size
    costs = [cost.of(pack, shape=shape) for pack in padded]
    ranks = [(0.0, rank) for rank in range(data_size)]  # kept sorted: cheapest first
    hands: list[list[int]] = [[] for _ in range(data_size)]
    for i in sorted(range(len(padded)), key=lambda i: (-costs[i], i)):
        total, rank = ranks.pop(0)
        hands[rank].append(i)
        if len(hands[rank]) < quota:
            bisect.insort(ranks, (total + costs[i], rank))
    return [[padded[i] for i in sorted(hand)] for hand in hands]
