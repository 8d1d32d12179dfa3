# SPDX-License-Identifier: Apache-2.0
"""Text and label tokens of every sample of a source, counted once and kept.

Comes in: a ShardTable, a tokenizer, the settings of the text. Every sample's text is encoded as conversation.py does
it for training; image sizes come from the rows; no image byte is read. Goes out: `SourceCounts`, which does not
depend on how images are resized or packs are filled, so another data.image_edge or pack length counts nothing again.

Kept beside the source's index.json as `lengths-<fingerprint>.npz`, or, where that folder cannot be written, in the
user's cache folder. Counting goes by parts of `PART_SAMPLES` samples, each a file of its own until all are there:
processes share the parts, and a killed one loses one part. Damaged files are counted again.

A row that cannot be read is counted as unfit and stays so while the file is there, readable again or not: the plan of
a run must not change between two starts. More than `max_unreadable` of them are refused and not kept.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.plan.counts_file import (
    DamagedCounts,
    SourceCounts,
    concatenate,
    cut,
    load_counts,
    save_counts,
)
from megatron_eve.data.read.conversation import EncodedSample, encode_samples
from megatron_eve.data.read.quarantine import UNREADABLE, Quarantined, SampleError
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Sample
from megatron_eve.errors import DataError

_LOG = logging.getLogger(__name__)
FORMAT = 4
"""Change it when the same settings would give other numbers."""
PART_SAMPLES = 16_384
_CHUNK = 2048  # samples that go through the tokenizer together
_LOOK_S = 0.2

Alive = Callable[[], None]
"""Called about every second while counting or waiting; may raise to end that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """Everything beside shards and tokenizer that decides a sample's text."""

    template: TemplateName
    max_text_tokens: int


class CountedSource:
    """The counts of one source, as far as they exist."""

    def __init__(
        self,
        table: ShardTable,
        source: int,
        *,
        settings: TextSettings,
        tokenizer: Tokenizer,
        max_unreadable: int,
    ) -> None:
        """`max_unreadable`: rows of the source that may be unreadable."""
        self._table, self.settings, self._tokenizer = table, settings, tokenizer
        self._begin, self._end = table.source_range(source)
        self._shards = range(*table.source_shards[source : source + 2].tolist())
        self._max_unreadable = max_unreadable
        self.folder = table.folders[source]
        decisive = (FORMAT, tokenizer.fingerprint, sorted(asdict(settings).items()))
        content = table.index_bytes(source) + repr(decisive).encode()
        name = f"lengths-{hashlib.sha256(content).hexdigest()[:16]}"
        self.path = _cache_folder(self.folder) / f"{name}.npz"

    @property
    def num_samples(self) -> int:
        return self._end - self._begin

    def missing_parts(self) -> list[int]:
        """Parts that are not counted yet."""
        if self.path.is_file():
            return []
        parts = range(-(-self.num_samples // PART_SAMPLES))
        return [part for part in parts if not self._part_path(part).is_file()]

    def missing_samples(self) -> int:
        """Samples in those parts."""
        return sum(map(self.samples_of, self.missing_parts()))

    def samples_of(self, part: int) -> int:
        return min(PART_SAMPLES, self.num_samples - part * PART_SAMPLES)

    def load(self, *, share: float = 0.0, alive: Alive = lambda: None) -> SourceCounts:
        """All counts of the source; missing ones are counted first, together with other processes that do so.

        `share`: in [0, 1), where among the missing parts to begin, so that processes take different ones.
        Raises: DataError if more rows than `max_unreadable` cannot be read, or the counts cannot be kept."""
        while True:
            if (counts := self._read(self.path, num_samples=self.num_samples)) is not None:
                self._remove_parts()
                return counts
            alive()
            if missing := self.missing_parts():
                self._count_missing(missing, share=share, alive=alive)
                continue
            with _lock_of(self.path) as is_mine:
                if is_mine and not self.path.is_file():
                    self._join()
                    continue
            time.sleep(_LOOK_S)  # another process is at it

    def count(self, part: int, *, alive: Alive = lambda: None) -> SourceCounts | None:
        """Count one part and keep it; None if another process is counting it or has counted it."""
        with _lock_of(self._part_path(part)) as is_mine:
            if not is_mine or part not in self.missing_parts():
                return None
            counts = self._count(part, alive=alive)
            self._refuse_too_many([counts])
            save_counts(counts, self._part_path(part))
            return counts

    def forget_unreadable(self) -> int:
        """Read unreadable rows again. Returns how many can be read now."""
        counts = self._read(self.path, num_samples=self.num_samples)
        if counts is None:
            return 0
        before = {i for i, entry in counts.unfit.items() if entry.reason in UNREADABLE}
        pieces: list[SourceCounts] = []
        ends = np.cumsum([0, *counts.num_images])
        at = 0
        for i in [*sorted(before), self.num_samples]:
            pieces.append(cut(counts, at, i, ends=ends))
            if i < self.num_samples:
                pieces.append(self._count_range(self._begin + i, self._begin + i + 1))
            at = i + 1
        whole = concatenate(pieces)
        self._refuse_too_many([whole])
        save_counts(whole, self.path)
        return len(before) - len(whole.unreadable)

    def _part_path(self, part: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.part-{part:05d}.npz")

    def _count_missing(self, missing: Sequence[int], *, share: float, alive: Alive) -> None:
        first = int(share * len(missing))
        _LOG.info(
            "counting the tokens of %s of %s samples in %s",
            f"{sum(map(self.samples_of, missing)):,}",
            f"{self.num_samples:,}",
            self.folder,
        )
        for part in (*missing[first:], *missing[:first]):
            self.count(part, alive=alive)
            alive()
        while self.missing_parts():  # another process counts it; if it dies, its lock is free
            for part in self.missing_parts():
                self.count(part, alive=alive)
            alive()
            time.sleep(_LOOK_S)

    def _count(self, part: int, *, alive: Alive) -> SourceCounts:
        begin = self._begin + part * PART_SAMPLES
        end = begin + self.samples_of(part)
        for shard in self._shards:
            if begin <= self._table.shard_begins[shard] < end:
                self._table.check_count(shard)
        pieces = []
        for first in range(begin, end, _CHUNK):
            alive()
            pieces.append(self._count_range(first, min(first + _CHUNK, end)))
        return concatenate(pieces)

    def _count_range(self, begin: int, end: int) -> SourceCounts:
        """Count the samples with these global indices."""
        unfit: dict[int, Quarantined] = {}
        headers: dict[int, Sample] = {}
        for i in range(begin, end):
            try:
                headers[i - begin] = self._table.read_header(i)
            except SampleError as error:
                unfit[i - begin] = self._entry(i, error, header=None)
        encoded = encode_samples(
            list(headers.values()),
            template=self.settings.template,
            tokenizer=self._tokenizer,
            max_text_tokens=self.settings.max_text_tokens,
        )
        num_text, num_labels, num_images = np.zeros((3, end - begin), np.int32)
        sizes: list[tuple[int, int]] = []
        for (i, header), text in zip(headers.items(), encoded, strict=True):
            num_images[i] = len(header.image_sizes)
            sizes += header.image_sizes
            if isinstance(text, EncodedSample):
                num_text[i], num_labels[i] = text.num_text, text.num_labels
            else:
                unfit[i] = self._entry(begin + i, text, header=header)
        return SourceCounts(
            num_text=num_text,
            num_labels=num_labels,
            num_images=num_images,
            image_sizes=np.asarray(sizes, np.uint32).reshape(-1, 2),
            unfit=dict(sorted(unfit.items())),
        )

    def _entry(self, index: int, error: SampleError, *, header: Sample | None) -> Quarantined:
        file, row = self._table.place(index)
        name, source = (header.id, header.source) if header else (self._table.name_of(index), "")
        return Quarantined(name, source, error.reason, error.message, str(file), row)

    def _refuse_too_many(self, parts: Sequence[SourceCounts]) -> None:
        unreadable = [entry for counts in parts for entry in counts.unreadable]
        if len(unreadable) > self._max_unreadable:
            raise too_many_unreadable(
                unreadable,
                allowed=self._max_unreadable,
                then="Copy these shards again and start again",
            )

    def _join(self) -> None:
        """One file of all parts. A part that is damaged, or that has unreadable rows beyond the limit, goes."""
        paths = [self._part_path(part) for part in range(-(-self.num_samples // PART_SAMPLES))]
        parts = [self._read(path, num_samples=self.samples_of(i)) for i, path in enumerate(paths)]
        present = [counts for counts in parts if counts is not None]
        if len(present) < len(parts):
            return
        try:
            self._refuse_too_many(present)
        except DataError:
            for path, counts in zip(paths, present, strict=True):
                if counts.unreadable:
                    path.unlink(missing_ok=True)  # counted again when the shards are repaired
            raise
        save_counts(concatenate(present), self.path)

    def _remove_parts(self) -> None:
        parts = self.path.parent.glob(f"{self.path.stem}.part-*")
        for path in (*parts, self.path.with_suffix(".lock")):
            with suppress(OSError):
                path.unlink()

    def _read(self, path: Path, *, num_samples: int) -> SourceCounts | None:
        """What a file holds; None if there is none, or if it was damaged and is removed."""

        def read_once() -> SourceCounts | None:
            with suppress(FileNotFoundError):
                return load_counts(path, num_samples=num_samples)
            return None

        try:
            return self._table.patience.read(path, read_once)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error}); make it readable, or remove it to count again."
            ) from error
        except DamagedCounts as error:
            _LOG.warning("%s: damaged (%s), its samples are counted again", path, error)
            path.unlink(missing_ok=True)
            return None


def too_many_unreadable(entries: Sequence[Quarantined], *, allowed: int, then: str) -> DataError:
    """The refusal. `entries`: rows that cannot be read, at least one."""
    files = len({entry.file for entry in entries})
    return DataError(
        f"{len(entries):,} samples in {files:,} shard files cannot be read, data.max_unreadable allows {allowed:,}; "
        f"the first: {entries[0].message}. {then}, or raise data.max_unreadable to go on without them."
    )


def _cache_folder(folder: Path) -> Path:
    """The source's own folder, or one below the user's cache folder if that cannot be written."""
    if os.access(folder, os.W_OK):
        return folder
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    cache = root / "megatron_eve" / "lengths" / name
    cache.mkdir(parents=True, exist_ok=True)
    _LOG.info("lengths of %s are kept in %s, because the former cannot be written", folder, cache)
    return cache


@contextmanager
def _lock_of(path: Path) -> Iterator[bool]:
    """Whether this process may write a file now: it has its lock, or the file system knows no locks."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    except (OSError, RuntimeError):  # no locks here: at worst two processes count the same
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
