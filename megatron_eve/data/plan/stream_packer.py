# SPDX-License-Identifier: Apache-2.0
"""Full packs of even cost from a stream of samples: chosen out of a pool of at most 1,024.

The pool keeps the samples in order of arrival. `take` makes one pack of them. Two words: a sample's *extra* is its cost
beyond that of as many padding tokens; its *excess* is the part of it beyond the average of as many tokens of the pool.
Full packs cost the same if their excesses add up to 0.
  1. The oldest sample is in, so none waits for ever.
  2. Of the 64 oldest, those join that bring the total excess nearest to 0. If it is unusually far from 0, the strongest
     counterweight of the whole pool joins.
  3. When room for about two and a half samples is left, the best ending is found among all pairs of the 256 oldest:
     at most T / 256 tokens unused, both segments padded to `align`, total excess nearest to 0. If there is none, the
     longest ending in the whole pool.
No sample joins that would lift the pack's cost more than 1/128 above the average. So a pack that begins with a very
costly sample stays partly empty: that costs a part of one pack, and filling it would make every rank wait.
Sums and weights are integers and the only division is IEEE's, so every machine makes the same packs. All is a function
of the pool and of what arrives: the pool is the whole state.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.plan.packing import Item, PackCost, PackShape, PlannedPack

MAX_POOL = 1024
"""Samples that the packer may look ahead."""
_OLDEST = 64
"""Samples among which the middle of a pack is chosen: packs stay near the order of the epoch."""
_UNUSUAL = 2.0  # an excess above so many times the average of the room left needs a counterweight
_ENDING_ROOM = 2.5  # in mean samples: what is left for the ending
_ENDING_POOL = 256  # samples whose pairs are tried as the ending
_UNUSED = 256  # a pack may leave T / 256 tokens unused if its cost gains by it
_DEARER = 128  # a pack may cost 1 / 128 more than the average if a sample joins
_NEVER = np.iinfo(np.int64).max

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Pool:
    """The pool as `take` sees it: columns of [num_samples], in order of arrival."""

    num_vision: Integers
    num_text: Integers
    num_tokens: Integers
    extra: Integers
    excess: Integers
    total_tokens: int
    limit: int  # of a pack's total extra, when a sample joins

    @classmethod
    def of(
        cls, num_vision: Integers, num_text: Integers, *, cost: PackCost, shape: PackShape
    ) -> "_Pool":
        num_tokens = num_vision + num_text
        extra = (cost.per_vision - cost.per_text) * num_vision  # padding is text for the most part
        extra += cost.per_text_label * num_text + cost.per_square * num_tokens**2
        total = int(num_tokens.sum())
        mean = int(extra.sum()) // total
        return cls(
            num_vision,
            num_text,
            num_tokens,
            extra,
            excess=extra - mean * num_tokens,
            total_tokens=total,
            limit=shape.pack_tokens * (mean + (cost.per_text + mean) // _DEARER),
        )


@dataclass(slots=True)
class _Draft:
    """A pack in the making: positions in the pool, sums over them, and who may still join."""

    free: NDArray[np.bool_]  # [num_samples] of the pool
    picked: list[int] = field(default_factory=list)
    num_vision: int = 0
    num_text: int = 0
    extra: int = 0
    excess: int = 0

    def add(self, position: int, pool: _Pool) -> None:
        self.free[position] = False
        self.picked.append(position)
        self.num_vision += int(pool.num_vision[position])
        self.num_text += int(pool.num_text[position])
        self.extra += int(pool.extra[position])
        self.excess += int(pool.excess[position])


@dataclass(frozen=True, slots=True)
class _Endings:
    """Samples that may end a pack, shortest first; row 0 is no sample, so that a pair with it is a single one."""

    position: Integers  # in the pool; -1 in row 0
    num_vision: Integers
    num_text: Integers
    num_tokens: Integers
    extra: Integers
    excess: Integers

    @classmethod
    def of(cls, pool: _Pool, free: Integers) -> "_Endings":
        free = free[np.argsort(pool.num_tokens[free], kind="stable")]
        rows = np.zeros((6, free.size + 1), np.int64)
        columns = (pool.num_vision, pool.num_text, pool.num_tokens, pool.extra, pool.excess)
        rows[0, 0], rows[0, 1:] = -1, free
        for row, column in zip(rows[1:], columns, strict=True):
            row[1:] = column[free]
        return cls(*rows)


class StreamPacker:
    """`add` samples while `accepts` takes some, `take` pack by pack; at the end of the stream `take` until empty."""

    def __init__(self, *, shape: PackShape, cost: PackCost, max_tokens: int) -> None:
        """`max_tokens`: the pool takes samples up to so many tokens, and up to MAX_POOL samples."""
        self._shape, self._cost, self._max_tokens = shape, cost, max_tokens
        self.clear()

    def clear(self) -> None:
        """Empty the pool."""
        self.samples = np.empty(0, np.int64)  # global indices, in order of arrival: the state
        self._num_vision = np.empty(0, np.int64)
        self._num_text = np.empty(0, np.int64)
        self._arrivals = np.empty(
            0, np.int64
        )  # of the pool's samples; only their order means something
        self._num_arrived = 0
        self.arrivals_of_last_pack = np.empty(0, np.int64)

    def __len__(self) -> int:
        """Samples in the pool."""
        return self.samples.size

    def accepts(self, num_tokens: Integers) -> int:
        """How many of the next samples, of so many tokens each, the pool has room for; one at least if it is empty."""
        held = int(self._num_vision.sum() + self._num_text.sum())
        count = int(np.searchsorted(held + np.cumsum(num_tokens), self._max_tokens, "right"))
        return min(max(count, 0 if len(self) else 1), MAX_POOL - len(self), num_tokens.size)

    def add(self, samples: Integers, *, num_vision: Integers, num_text: Integers) -> None:
        """Samples arrive. Each must fit into a pack of its own (plan.py leaves out those that do not)."""
        self.samples = np.concatenate([self.samples, samples])
        self._num_vision = np.concatenate([self._num_vision, num_vision])
        self._num_text = np.concatenate([self._num_text, num_text])
        arrivals = np.arange(self._num_arrived, self._num_arrived + samples.size)
        self._arrivals = np.concatenate([self._arrivals, arrivals])
        self._num_arrived += samples.size

    def take(self) -> PlannedPack:
        """One pack out of the pool, which must not be empty; its samples in order of arrival.

        `arrivals_of_last_pack` then has the number of each of them among all that arrived."""
        pool = _Pool.of(self._num_vision, self._num_text, cost=self._cost, shape=self._shape)
        draft = _Draft(np.ones(len(self), np.bool_))
        draft.add(0, pool)
        self._fill_middle(draft, pool)
        self._fill_end(draft, pool)
        taken = np.sort(np.asarray(draft.picked))
        columns = (self.samples[taken], self._num_vision[taken], self._num_text[taken])
        pack = tuple(map(Item, *(column.tolist() for column in columns)))
        self.arrivals_of_last_pack = self._arrivals[taken]
        self.samples = self.samples[draft.free]
        self._num_vision = self._num_vision[draft.free]
        self._num_text = self._num_text[draft.free]
        self._arrivals = self._arrivals[draft.free]
        return pack

    def _fill_middle(self, draft: _Draft, pool: _Pool) -> None:
        """Add samples one by one, until room for the ending is left or none fits."""
        tokens, extra = pool.num_tokens[:_OLDEST], pool.extra[:_OLDEST]
        excess = pool.excess[:_OLDEST].astype(np.float64)  # infinite once picked; exact below 2**53
        excess[0] = np.inf
        longest, dearest = int(tokens.max()), int(extra.max())
        unusual = _UNUSUAL * int(np.abs(pool.excess).sum()) / pool.total_tokens  # by token
        # what certainly fits: padding takes less than one `align` in each segment
        room = self._shape.pack_tokens - 2 * (self._shape.align - 1)
        ending = int(_ENDING_ROOM * pool.total_tokens / len(self))
        while (left := room - draft.num_vision - draft.num_text) > ending:
            budget = pool.limit - draft.extra
            if abs(draft.excess) > unusual * left:
                score = pool.excess / pool.num_tokens * (1 if draft.excess > 0 else -1)
                fits = draft.free & (pool.num_tokens <= left) & (pool.extra <= budget)
                score[~fits] = np.inf
            else:
                # The excess that would be left, by token of the room that would be left to make up for it.
                score = np.abs(excess + draft.excess)
                if longest < left and dearest <= budget:
                    score /= left - tokens
                else:
                    score /= np.maximum(left - tokens, 1)
                    score[(tokens > left) | (extra > budget)] = np.inf
            best = int(score.argmin())
            if score[best] == np.inf:
                break
            draft.add(best, pool)
            excess[best : best + 1] = np.inf

    def _fill_end(self, draft: _Draft, pool: _Pool) -> None:
        """Add endings of one or two samples, until the pack is full or none fits."""
        unused = self._shape.pack_tokens // _UNUSED
        while self._shape.pack_tokens - draft.num_vision - draft.num_text > unused:
            positions = np.flatnonzero(draft.free)
            ending = self._full_ending(draft, pool, _Endings.of(pool, positions[:_ENDING_POOL]))
            ending = ending or self._longest_ending(draft, pool, _Endings.of(pool, positions))
            if not ending:
                break
            for position in ending:
                draft.add(position, pool)

    def _full_ending(self, draft: _Draft, pool: _Pool, rows: _Endings) -> list[int]:
        """Of the endings that leave at most T / 256 tokens unused, that with the total excess nearest to 0."""
        room = self._shape.pack_tokens - draft.num_vision - draft.num_text
        least = room - self._shape.pack_tokens // _UNUSED
        begin = np.searchsorted(rows.num_tokens, least - rows.num_tokens)
        end = np.searchsorted(rows.num_tokens, room - rows.num_tokens, "right")
        first, second = _pairs(begin, end)
        score = np.abs(draft.excess + rows.excess[first] + rows.excess[second])
        return self._best(draft, pool, rows, first, second, score=score)

    def _longest_ending(self, draft: _Draft, pool: _Pool, rows: _Endings) -> list[int]:
        """An ending with few tokens unused, when none leaves few enough; none if no sample fits.

        Looks at the longest partners that each sample's room allows, four of them because the padding of a segment may
        forbid some, and at each sample alone."""
        room = self._shape.pack_tokens - draft.num_vision - draft.num_text
        end = np.searchsorted(rows.num_tokens, room - rows.num_tokens, "right")
        begin = end - 4
        begin[0] = 0  # row 0 is no sample: its partners stand alone
        first, second = _pairs(begin, end)
        score = room - rows.num_tokens[first] - rows.num_tokens[second]
        return self._best(draft, pool, rows, first, second, score=score)

    def _best(
        self,
        draft: _Draft,
        pool: _Pool,
        rows: _Endings,
        first: Integers,
        second: Integers,
        *,
        score: Integers,
    ) -> list[int]:
        """Positions of the pair of rows with the lowest score that fits; empty if none does."""
        align = self._shape.align
        num_vision = draft.num_vision + rows.num_vision[first] + rows.num_vision[second]
        num_text = draft.num_text + rows.num_text[first] + rows.num_text[second]
        # PackShape.fits, by element
        blocks = np.maximum(-(-num_vision // align), 1) + np.maximum(-(-num_text // align), 1)
        fits = blocks <= self._shape.pack_tokens // align
        fits &= rows.extra[first] + rows.extra[second] <= pool.limit - draft.extra
        if not fits.any():
            return []
        score[~fits] = _NEVER
        best = int(score.argmin())
        pair = (int(rows.position[first[best]]), int(rows.position[second[best]]))
        return [position for position in pair if position >= 0]


def _pairs(begin: Integers, end: Integers) -> tuple[Integers, Integers]:
    """All (i, j) with i < j and begin[i] <= j < end[i], as two arrays [num_pairs]."""
    rows = np.arange(begin.size)
    begin = np.maximum(begin, rows + 1)
    counts = np.maximum(end - begin, 0)
    first = np.repeat(rows, counts)
    second = np.arange(first.size) - np.repeat(np.cumsum(counts) - counts - begin, counts)
    return first, second
