# SPDX-License-Identifier: Apache-2.0
"""Which samples share a pack. Pure integer arithmetic on (vision tokens, text tokens); no pixels, no text.

A pack has T tokens in two segments, vision and text, each padded to a multiple of `align` and at least one `align`
(see sample.py). So samples fit together when ceil(sum of vision) + ceil(sum of text) <= T, which is checked exactly.
Here: `pack_batch`, best fit, longest first, for a set of samples that must be one step; `PackCost`, what a pack costs;
`deal`, packs to data-parallel ranks so that costs are even. Packs from a stream of samples: stream_packer.py.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_eve.config.decoder import Modality, decoder_layer
from megatron_eve.config.schema import ModelConfig, TrainableGroup
from megatron_eve.errors import ConfigError


class Item(NamedTuple):
    """A sample as the packer sees it: its global index in the shard table, its tokens, its place in data order."""

    sample: int
    num_vision: int
    num_text: int
    place: int = 0  # in data order; plan.py numbers the samples of a step 0, 1, 2 ...

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


def pack_batch(items: Sequence[Item], *, shape: PackShape) -> list[PlannedPack]:
    """Packs that hold exactly these items: best fit, longest first. Inside a pack, and pack by pack, the given order.

    Every item must fit into a pack of its own (plan.py leaves out those that do not)."""
    order = sorted(range(len(items)), key=lambda i: (-items[i].num_tokens, i))
    open_packs: list[
        tuple[int, int]
    ] = []  # (tokens, -number): the fullest last, of equals the oldest
    segments: list[tuple[int, int]] = []  # real vision and text tokens of each pack
    places: list[list[int]] = []
    for i in order:
        item = items[i]
        with_room = bisect.bisect_right(open_packs, (shape.pack_tokens - item.num_tokens, 0))
        for position in range(with_room - 1, -1, -1):
            number = -open_packs[position][1]
            vision, text = segments[number]
            if shape.fits(vision + item.num_vision, text + item.num_text):
                del open_packs[position]
                break
        else:
            number, (vision, text) = len(places), (0, 0)
            segments.append((0, 0))
            places.append([])
        places[number].append(i)
        segments[number] = (vision + item.num_vision, text + item.num_text)
        bisect.insort(open_packs, (sum(segments[number]), -number))
    return [tuple(items[i] for i in members) for members in sorted(map(sorted, places))]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackCost:
    """Multiply-adds of a pack: for each token of a segment, padding included, and in attention for the square of each
    sample's tokens. Integers, so that every machine plans the same packs."""

    per_vision: int
    per_text: int
    per_text_label: int  # on top of per_text, for real text tokens alone
    per_square: int

    @classmethod
    def of_model(cls, model: ModelConfig, *, trainable: Sequence[TrainableGroup]) -> "PackCost":
        """Multiply-adds of a decoder layer, forward and backward, and a layer's share of the output layer.

        A weight matrix is passed three times (forward, gradient of the input, gradient of the weight), a frozen one
        twice. Causal attention does half of the square in each of its two products. Which text tokens carry a label is
        not known from lengths: all are taken to, which holds for captions and is too many for questions."""

        def passes(group: TrainableGroup) -> int:
            return 3 if group in trainable else 2

        def per_token(modality: Modality) -> int:
            return sum(
                passes(linear.group(modality, model.split)) * linear.weights
                for linear in layer.linears
            )

        layer = decoder_layer(model)
        output = passes("text") * model.hidden_size * model.vocab_size
        return cls(
            per_vision=per_token("vision"),
            per_text=per_token("text"),
            per_text_label=output // model.num_layers,
            per_square=3 * layer.query_width,
        )

    def of(self, pack: PlannedPack, *, shape: PackShape) -> int:
        vision = text = squares = 0
        for _, num_vision, num_text, _ in pack:
            vision += num_vision
            text += num_text
            squares += (num_vision + num_text) ** 2
        segment = shape.segment(vision)
        return (
            self.per_vision * segment
            + self.per_text * (shape.pack_tokens - segment)
            + self.per_text_label * text
            + self.per_square * squares
        )


def deal(
    packs: Sequence[PlannedPack], *, data_size: int, cost: PackCost, shape: PackShape
) -> list[list[PlannedPack]]:
    """The packs of each data-parallel rank: the same number for all (padding packs added), costs as even as greedy can.

    Costliest first, each to the rank with the least so far that may still take one. Within a rank the packs keep
    their order in the step."""
    padded = [*packs, *([()] * (-len(packs) % data_size))]
    quota = len(padded) // data_size
    costs = [cost.of(pack, shape=shape) for pack in padded]
    ranks = [(0, rank) for rank in range(data_size)]  # kept sorted: cheapest first
    hands: list[list[int]] = [[] for _ in range(data_size)]
    for i in sorted(range(len(padded)), key=lambda i: (-costs[i], i)):
        total, rank = ranks.pop(0)
        hands[rank].append(i)
        if len(hands[rank]) < quota:
            bisect.insort(ranks, (total + costs[i], rank))
    return [[padded[i] for i in sorted(hand)] for hand in hands]
