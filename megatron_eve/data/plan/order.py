# SPDX-License-Identifier: Apache-2.0
"""Which samples, in which packs, in which step: the global plan that every data-parallel rank computes for itself.

The order of samples is a pure function of (seed, epoch); position in it, and in mode `packs` the packer's pool, are the
whole state: about a thousand integers, the same on every rank, independent of the number of ranks and workers. Order
within a source: mosaicml-streaming's `py1e` shuffle (Stream's default), over the samples that are fit for training.
Several sources: an epoch has as many samples as all sources together, shared out by proportion; a source continues
from epoch to epoch where it stopped, so that each of its samples comes once before any comes twice.

Modes (BatchConfig): `samples`, the next `size` samples are one step, packed as they need; `packs`, a step is exactly
`size` packs from the stream packer, whose pool an epoch's end empties. Source: reference for both is the paper's count
of samples per step, and fixed tokens per step as in language-model training.
"""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import BatchConfig, DataConfig
from megatron_eve.data.plan.lengths import SampleLengths
from megatron_eve.data.plan.packing import Item, PackCost, PackShape, PlannedPack, pack_batch
from megatron_eve.data.plan.stream_packer import MAX_POOL, StreamPacker
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.streaming_import import get_shuffle
from megatron_eve.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
_SHUFFLE = "py1e"
_PACKER = 2  # change it when the stream packer makes other packs of the same samples


class SampleOrder:
    """Global sample indices of an epoch, in the order of training."""

    def __init__(self, *, table: ShardTable, lengths: SampleLengths, data: DataConfig) -> None:
        self._seed = data.seed
        self._block_size = data.shuffle_block_size
        usable = lengths.usable
        self._indices: list[NDArray[np.int64]] = []  # usable global indices of each source
        self._shard_sizes: list[NDArray[np.int64]] = []  # usable samples of each shard that has any
        for source in range(table.num_sources):
            begins = table.source_shard_begins(source)
            indices = begins[0] + np.flatnonzero(usable[begins[0] : begins[-1]])
            sizes = np.diff(np.searchsorted(indices, begins))
            self._indices.append(indices)
            self._shard_sizes.append(sizes[sizes > 0])
        self._share = _share_out(
            [indices.size for indices in self._indices], data=data, lengths=lengths
        )
        self.num_tokens = _tokens_of_an_epoch(self._indices, self._share, lengths=lengths)
        self._warn_of_small_blocks()
        self._cached: tuple[int, NDArray[np.int64]] | None = None
        content = [*self._indices, *self._shard_sizes, np.asarray(self._share)]
        digest = hashlib.sha256(repr((self._seed, self._block_size)).encode())
        for array in content:
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def _warn_of_small_blocks(self) -> None:
        largest = max(int(sizes.max()) for sizes in self._shard_sizes if sizes.size)
        if 0.75 * self._block_size < largest:
            _LOG.warning(
                "data.shuffle_block_size=%d is too small to mix shards of %d samples with their neighbours; "
                "use at least twice the largest shard",
                self._block_size,
                largest,
            )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self._share)

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """[num_samples] the epoch's samples; the last epoch asked for is kept."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._shuffled(epoch))
        return self._cached[1]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        source_of = np.repeat(np.arange(len(self._share)), self._share)
        if len(self._share) > 1:
            np.random.default_rng([self._seed, epoch]).shuffle(source_of)
        order = np.empty(len(self), np.int64)
        for source, count in enumerate(self._share):
            order[source_of == source] = self._stretch(source, begin=epoch * count, count=count)
        return order

    def _stretch(self, source: int, *, begin: int, count: int) -> NDArray[np.int64]:
        """`count` samples of a source's endless sequence of shuffled passes, from `begin` on."""
        if count == 0:
            return np.empty(0, np.int64)
        size = self._indices[source].size
        first, last = begin // size, (begin + count - 1) // size
        seed = int(np.random.SeedSequence([self._seed, source]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # small blocks: __init__ has warned once
            passes = [
                get_shuffle(_SHUFFLE, self._shard_sizes[source], 1, seed, number, self._block_size)
                for number in range(first, last + 1)
            ]
        offset = begin - first * size
        places = np.concatenate(passes)[offset : offset + count]
        return self._indices[source][places]


def _share_out(sizes: list[int], *, data: DataConfig, lengths: SampleLengths) -> list[int]:
    """Samples of each source in an epoch: the total by proportion, remainders to the largest fractions."""
    if sum(sizes) == 0:
        raise DataError(
            f"data.sources hold no sample fit for training; left out by reason: {dict(lengths.reasons)}. "
            "See quarantine.jsonl and correct the data or data.template."
        )
    if len(sizes) == 1:
        return sizes
    weights = [source.proportion for source in data.sources]
    if min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(
            f"data.sources: proportions are {weights}; use numbers >= 0, not all zero."
        )
    for source, size in zip(data.sources, sizes, strict=True):
        if size == 0 and source.proportion > 0:
            raise DataError(
                f"{source.path}: no sample fit for training, but proportion={source.proportion}; "
                "take the source out of data.sources or correct it (quarantine.jsonl has the reasons)."
            )
    exact = np.asarray(weights) / sum(weights) * sum(sizes)
    share = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - share), kind="stable")[: sum(sizes) - int(share.sum())]
    share[largest] += 1
    result: list[int] = share.tolist()
    return result


def _tokens_of_an_epoch(
    indices: list[NDArray[np.int64]], share: list[int], *, lengths: SampleLengths
) -> int:
    """Exact if a source is used whole, else by its mean."""
    total = 0.0
    for source, count in zip(indices, share, strict=True):
        if count:
            tokens = lengths.num_vision[source].sum(dtype=np.int64)
            tokens += lengths.num_text[source].sum(dtype=np.int64)
            total += count / source.size * float(tokens)
    return round(total)


def _most_samples(batch: BatchConfig, *, lengths: SampleLengths, shape: PackShape) -> int:
    """An upper bound on the samples of a step, from the shortest sample that is trained on."""
    if batch.unit == "samples":
        return batch.size
    num_tokens = lengths.num_vision[lengths.usable] + lengths.num_text[lengths.usable]
    return batch.size * (shape.pack_tokens // max(1, int(num_tokens.min())))


def _numbered(packs: list[PlannedPack], arrivals: list[NDArray[np.int64]]) -> list[PlannedPack]:
    """The same packs, their samples numbered in the order in which they arrived at the packer."""
    places = iter(np.concatenate(arrivals).argsort().argsort().tolist())
    return [tuple(item._replace(place=next(places)) for item in pack) for pack in packs]


class PackPlan:
    """Steps of packs, one after another, with a state that continues exactly."""

    def __init__(
        self,
        *,
        order: SampleOrder,
        lengths: SampleLengths,
        shape: PackShape,
        cost: PackCost,
        batch: BatchConfig,
        pool_packs: int,
    ) -> None:
        """`pool_packs` (data.open_bins): the packer chooses from as many samples as fill these, at most MAX_POOL."""
        if batch.size < 1 or pool_packs < 1:
            raise ConfigError(
                f"batch.size={batch.size} and data.open_bins={pool_packs} must be at least 1."
            )
        self._order = order
        self._lengths = lengths
        self._shape = shape
        self._batch = batch
        self._packer = StreamPacker(
            shape=shape, cost=cost, max_tokens=pool_packs * shape.pack_tokens
        )
        self._epoch = 0
        self._position = 0
        self.max_samples = _most_samples(batch, lengths=lengths, shape=shape)
        """No step has more; the same in every step and on every rank."""
        # the pool depends on what decides a pack; in mode `samples` nothing is carried from step to step
        packing = (_PACKER, shape, cost, pool_packs) if batch.unit == "packs" else ()
        digest = hashlib.sha256(repr((order.fingerprint, batch.unit, packing)).encode())
        digest.update(lengths.num_vision.tobytes())
        digest.update(lengths.num_text.tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def next_step(self) -> list[PlannedPack]:
        """The packs of the next step, before padding packs, in an order that does not depend on the ranks. Items carry
        the place of their sample in the step: samples count in the order of the epoch, whatever pack they are in. The
        packer chooses the samples of a step of packs; they, too, are numbered in that order."""
        if self._batch.unit == "samples":
            return pack_batch(self._next_items(self._batch.size), shape=self._shape)
        packs, arrivals = [], []
        for _ in range(self._batch.size):
            packs.append(self._next_pack())
            arrivals.append(self._packer.arrivals_of_last_pack)
        return _numbered(packs, arrivals)

    def _next_items(self, count: int) -> list[Item]:
        items: list[Item] = []
        while len(items) < count:
            self._enter_next_epoch_at_the_end()
            columns = self._ahead(count - len(items))
            places = range(len(items), len(items) + columns[0].size)
            items += map(Item, *(column.tolist() for column in columns), places)
            self._position += columns[0].size
        return items

    def _next_pack(self) -> PlannedPack:
        if not len(self._packer):
            self._enter_next_epoch_at_the_end()
        samples, num_vision, num_text = self._ahead(MAX_POOL - len(self._packer))
        count = self._packer.accepts(num_vision + num_text)
        self._packer.add(samples[:count], num_vision=num_vision[:count], num_text=num_text[:count])
        self._position += count
        return self._packer.take()

    def _enter_next_epoch_at_the_end(self) -> None:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0

    def _ahead(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The next samples of the epoch, at most `count`, with their vision and text tokens."""
        samples = self._order.epoch(self._epoch)[self._position : self._position + count]
        return samples, *self._tokens(samples)

    def _tokens(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lengths = self._lengths
        return lengths.num_vision[samples].astype(np.int64), lengths.num_text[samples].astype(
            np.int64
        )

    def state_dict(self) -> dict[str, Any]:
        """Small and JSON-able; the same on every rank."""
        return {
            "fingerprint": self.fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "pool": self._packer.samples.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step that the state was taken from. Raises DataError if the plan differs."""
        if state["fingerprint"] != self.fingerprint:
            raise DataError(
                f"the checkpoint's data state belongs to plan {state['fingerprint']}, this run has plan "
                f"{self.fingerprint}: sources, quarantined or unreadable samples, data.seed, shuffle_block_size, "
                "tokenizer, template or batch.unit changed (with batch.unit=packs also pack_tokens, align, "
                "open_bins, the model, stage.trainable, or the packer of another version). Restore them, "
                "or start a new run from the weights (checkpoint.load_weights_from)."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        pool = np.asarray(state["pool"], np.int64)
        num_vision, num_text = self._tokens(pool)
        self._packer.clear()
        self._packer.add(pool, num_vision=num_vision, num_text=num_text)
