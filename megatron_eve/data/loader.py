# SPDX-License-Identifier: Apache-2.0
"""Packs, step by step: the plan's samples read, decoded and assembled, ahead of the trainer.

`next(loader)` is this data-parallel rank's micro-batches of the next global step. All ranks compute the same plan and
take their share, so the ranks' packs together are the same for any number of ranks, and the packs' bytes are the same
for any number of worker threads. The state is that after the last step returned, however far ahead the threads are. A
sample that cannot be read or decoded keeps its place in the pack, without labels, and is reported (pack_builder.py);
any other error in a thread surfaces at `next`. data.max_unreadable limits the unreadable samples: here those that are
known at the start, in training/unreadable.py those that turn up later on any rank.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megatron_eve.config.schema import BatchConfig, DataConfig, ModelConfig, TrainableGroup
from megatron_eve.config.sizes import EpochSize
from megatron_eve.data.pack_builder import PackBuilder
from megatron_eve.data.plan.counting import Alive, too_many_unreadable
from megatron_eve.data.plan.lengths import (
    START_LIMIT,
    LengthSettings,
    SampleLengths,
    load_lengths,
    unreadable_limit,
)
from megatron_eve.data.plan.order import PackPlan, SampleOrder
from megatron_eve.data.plan.packing import PackCost, PackShape, PlannedPack, deal
from megatron_eve.data.read.quarantine import UNREADABLE, Quarantined, QuarantineReport, SampleError
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer, refuse_ids_beyond
from megatron_eve.data.sample import Pack
from megatron_eve.errors import DataError

_LOG = logging.getLogger(__name__)
FAULTS = ("unreadable", "read_retries")
"""What a loader counts from step to step: rows that turn out to be unreadable, each once; reads tried again."""

IsFirst = Callable[[str], bool]
"""Whether this is the first question about a name."""


def first_time() -> IsFirst:
    """For a loader without peers."""
    known: set[str] = set()

    def is_first(name: str) -> bool:
        is_new = name not in known
        known.add(name)
        return is_new

    return is_first


@dataclass(frozen=True, slots=True)
class _PendingStep:
    packs: list[Future[tuple[Pack, list[Quarantined]]]]
    state_after: dict[str, Any]


class PackLoader:
    """Iterator over steps; see the module's docstring. `close()` it, or use it as a context manager."""

    def __init__(
        self,
        *,
        data: DataConfig,
        batch: BatchConfig,
        model: ModelConfig,
        trainable: Sequence[TrainableGroup],
        tokenizer: Tokenizer,
        data_rank: int,
        data_size: int,
        device: Literal["cpu", "cuda"],
        quarantine_report: Path | None = None,
        alive: Alive = lambda: None,
        is_first: IsFirst | None = None,
    ) -> None:
        """`trainable`: the stage's, because a frozen branch costs less and packs are to cost the same.
        `quarantine_report`: a quarantine.jsonl to append to; what the plan leaves out by data rank 0 alone.
        `alive`: called while tokens are counted (counting.py). `is_first`: over all loaders of the run."""
        if not 0 <= data_rank < data_size:
            raise DataError(f"data_rank={data_rank} is not one of data_size={data_size} ranks")
        refuse_ids_beyond(tokenizer, vocab_size=model.vocab_size)
        self._data_rank, self._data_size = data_rank, data_size
        self._report = QuarantineReport(quarantine_report) if quarantine_report else None
        self._shape = PackShape(pack_tokens=data.pack_tokens, align=data.align)
        self._cost = PackCost.of_model(model, trainable=trainable)
        self._table = ShardTable.open([source.path for source in data.sources])
        settings = LengthSettings.of_sources(data, model=model)
        lengths = self._open_lengths(data, settings=settings, tokenizer=tokenizer, alive=alive)
        order = SampleOrder(table=self._table, lengths=lengths, data=data)
        self._plan = PackPlan(
            order=order,
            lengths=lengths,
            shape=self._shape,
            cost=self._cost,
            batch=batch,
            pool_packs=data.open_bins,
        )
        self._builder = PackBuilder(
            table=self._table,
            settings=settings,
            tokenizer=tokenizer,
            shape=self._shape,
            model=model,
            device=device,
            exif_rotation=data.exif_rotation,
            step_places=self._plan.max_samples,
        )
        self._ahead = max(1, data.prefetch_steps) if data.num_workers else 1
        self._pool = (
            ThreadPoolExecutor(data.num_workers, thread_name_prefix="pack-loader")
            if data.num_workers
            else None
        )
        self._pending: deque[_PendingStep] = deque()
        self._retries_taken = self._num_unreadable = 0
        self._is_first = is_first or first_time()
        self._state = self._plan.state_dict()
        self.epoch_size = EpochSize(samples=len(order), tokens=order.num_tokens)

    def _open_lengths(
        self,
        data: DataConfig,
        *,
        settings: Sequence[LengthSettings],
        tokenizer: Tokenizer,
        alive: Alive,
    ) -> SampleLengths:
        """Counts what is not kept yet; reports what the plan leaves out. Raises: ConfigError, DataError."""
        limit = unreadable_limit(data.max_unreadable, num_samples=len(self._table))
        lengths = load_lengths(
            self._table,
            settings=settings,
            tokenizer=tokenizer,
            shape=self._shape,
            max_unreadable=limit,
            start_limit=START_LIMIT,
            share=self._data_rank / self._data_size,
            alive=alive,
        )
        self._report_left_out(lengths, num_total=len(self._table))
        # Samples that may turn out to be unreadable in training.
        self.unreadable_left = limit - self._refuse_lost_files(lengths, limit=limit)
        return lengths

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        while len(self._pending) < self._ahead:
            self._pending.append(self._submit_step())
        step = self._pending.popleft()
        finished = [future.result() for future in step.packs]
        self._state = step.state_after
        if self._pool is not None:
            self._pending.append(self._submit_step())
        masked = [entry for _, entries in finished for entry in entries]
        if masked:
            self._report_masked(masked)
        return [pack for pack, _ in finished]

    def state_dict(self) -> dict[str, Any]:
        """State after the last step returned: small, JSON-able, the same on every rank and for any number of them."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the step that the state was taken from. Raises DataError if the data plan is another one."""
        self._cancel_pending()
        self._plan.load_state_dict(state)
        self._state = self._plan.state_dict()

    def close(self) -> None:
        """Stop the threads. Safe to call twice."""
        self._cancel_pending()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "PackLoader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit_step(self) -> _PendingStep:
        packs = self._plan.next_step()
        mine = deal(packs, data_size=self._data_size, cost=self._cost, shape=self._shape)
        futures = [self._submit(pack) for pack in mine[self._data_rank]]
        return _PendingStep(futures, self._plan.state_dict())

    def _submit(self, planned: PlannedPack) -> Future[tuple[Pack, list[Quarantined]]]:
        if self._pool is not None:
            return self._pool.submit(self._builder.build, planned)
        done: Future[tuple[Pack, list[Quarantined]]] = Future()
        done.set_result(self._builder.build(planned))
        return done

    def _cancel_pending(self) -> None:
        for step in self._pending:
            for future in step.packs:
                future.cancel()
        self._pending.clear()

    @property
    def fingerprint(self) -> str:
        """Identifies the plan; loaders with the same plan share its packs."""
        return self._plan.fingerprint

    def take_faults(self) -> dict[str, int]:
        """FAULTS since the last call."""
        retries, unreadable = self._table.patience.num_retries, self._num_unreadable
        faults = {"unreadable": unreadable, "read_retries": retries - self._retries_taken}
        self._retries_taken, self._num_unreadable = retries, 0
        return faults

    def _refuse_lost_files(self, lengths: SampleLengths, *, limit: int) -> int:
        """How many samples the plan leaves out because they are unreadable.

        Raises: DataError if these and what damaged files lack now, which will be masked, are more than `limit`."""
        known = [entry for entry in lengths.unfit.values() if entry.reason in UNREADABLE]
        num_left_out = len(known)
        for index in self._table.lost_samples():
            if index not in lengths.unfit:
                file, row = self._table.place(index)
                shard = self._table.shard_of(index)
                message = self._table.damaged[shard]
                known.append(Quarantined("", "", "unreadable_file", message, str(file), row))
        if len(known) > limit:
            raise too_many_unreadable(known, allowed=limit, then="Copy these files again")
        return num_left_out

    def _report_left_out(self, lengths: SampleLengths, *, num_total: int) -> None:
        if self._data_rank != 0:
            return
        for problem in self._table.damaged.values():
            _LOG.warning("%s; samples in it that cannot be read are masked", problem)
        if not lengths.unfit:
            return
        counts = ", ".join(f"{reason} {count:,}" for reason, count in lengths.reasons.most_common())
        _LOG.warning(
            "%s of %s samples left out: %s", f"{len(lengths.unfit):,}", f"{num_total:,}", counts
        )
        if self._report is not None:
            indices = {entry.key: index for index, entry in lengths.unfit.items()}
            missing = self._report.missing(lengths.unfit.values())
            self._report.add([self._named(entry, indices[entry.key]) for entry in missing])

    def _named(self, entry: Quarantined, index: int) -> Quarantined:
        """With the sample's own id, where lengths did not need its row."""
        if entry.id:
            return entry
        try:
            header = self._table.read_header(index)
        except SampleError:
            return replace(entry, id=self._table.name_of(index))
        return replace(entry, id=header.id, source=header.source)

    def _report_masked(self, entries: Sequence[Quarantined]) -> None:
        for entry in entries:
            if entry.reason in UNREADABLE and self._is_first(f"{entry.file}:{entry.row}"):
                self._num_unreadable += 1
        if self._report is None:
            new = entries
        else:
            new = self._report.missing(entries)
            self._report.add(new)
        for entry in new:
            _LOG.warning("sample %s masked: %s: %s", entry.id, entry.reason, entry.message)
