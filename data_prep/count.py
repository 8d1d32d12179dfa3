# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens of shards ahead of a run, in several processes: `python -m data_prep count`.

Counts are kept part by part where the trainer looks for them (megatron_eve/data/plan/counting.py), so a killed count
goes on where it stopped, and may run beside another one or a trainer that counts the same.
"""

import functools
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from megatron_eve.data.plan.counting import CountedSource, TextSettings
from megatron_eve.data.plan.counts_file import SourceCounts
from megatron_eve.data.plan.lengths import unreadable_limit
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import DataError

from .count_options import CountOptions
from .workers import worker_processes

Part = tuple[CountOptions, int, int]
"""Options, number of the source, number of the part."""


def count_shards(options: CountOptions) -> list[str]:
    """Count what is not counted yet. Returns the lines to print.

    Raises: ConfigError, DataError; what was counted until then is kept."""
    # a process a core; more threads in each would only wait for each other
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sources = _sources(options)
    parts = [
        (options, number, part)
        for number, source in enumerate(sources)
        for part in source.missing_parts()
    ]
    num_samples = sum(source.num_samples for source in sources)
    to_count = sum(source.missing_samples() for source in sources)
    progress = _Progress(num_samples=to_count, num_parts=len(parts))
    for done in _counted(parts, num_workers=min(options.workers, max(1, len(parts)))):
        progress.report(done)
    progress.bar.close()
    if options.again:
        found = sum(source.forget_unreadable() for source in sources)
        print(f"{found:,} rows can be read now that could not be before", file=sys.stderr)
    counts = [source.load() for source in sources]
    return [
        *_summary(counts, kept=num_samples - to_count),
        *(f"kept in {source.path}" for source in sources),
    ]


@functools.lru_cache(maxsize=1)
def _sources(options: CountOptions) -> tuple[CountedSource, ...]:
    """Opened once in each process."""
    table = ShardTable.open(options.shards)
    settings = TextSettings(template=options.template, max_text_tokens=options.max_text_tokens)
    return tuple(
        CountedSource(
            table,
            source,
            settings=settings,
            tokenizer=load_tokenizer(options.tokenizer),
            max_unreadable=unreadable_limit(options.max_unreadable, num_samples=len(table)),
        )
        for source in range(table.num_sources)
    )


def count_part(part: Part) -> int:
    """Count one part and keep it; the number of its samples."""
    options, number, of_source = part
    source = _sources(options)[number]
    source.count(of_source)
    return source.samples_of(of_source)


def _counted(parts: list[Part], *, num_workers: int) -> Iterator[int]:
    waiting: deque[Future[int]] = deque()
    with worker_processes(count_part, num_workers=num_workers) as submit:
        for part in parts:
            waiting.append(submit(part))
            if len(waiting) > 2 * num_workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(future: "Future[int]") -> int:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that counted died (out of memory?); run the same command again, with fewer --workers if "
            "memory was short."
        ) from error


class _Progress:
    """On stderr: a bar on a terminal, else one line a part."""

    def __init__(self, *, num_samples: int, num_parts: int) -> None:
        self._samples, self._num_samples = 0, num_samples
        self._parts, self._num_parts = 0, num_parts
        self.bar = tqdm(
            total=num_samples, unit="sample", file=sys.stderr, disable=not sys.stderr.isatty()
        )

    def report(self, num_samples: int) -> None:
        self._samples += num_samples
        self._parts += 1
        self.bar.update(num_samples)
        if self.bar.disable:
            print(
                f"counted {self._samples:,} of {self._num_samples:,} samples "
                f"({self._parts:,}/{self._num_parts:,} parts)",
                file=sys.stderr,
                flush=True,
            )


def _summary(counts: list[SourceCounts], *, kept: int) -> list[str]:
    total = sum(of_source.num_text.size for of_source in counts)
    reasons = Counter(entry.reason for of_source in counts for entry in of_source.unfit.values())
    left_out = sum(reasons.values())
    names = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
    text = sum(int(of_source.num_text.sum()) for of_source in counts)
    labels = sum(int(of_source.num_labels.sum()) for of_source in counts)
    before = f", {kept:,} of them before" if kept else ""
    return [
        f"counted {total:,} samples{before}: {total - left_out:,} for training + {left_out:,} left out"
        + (f" ({names})" if names else ""),
        f"{text:,} text tokens, {labels:,} of them labels, and "
        f"{sum(len(of_source.image_sizes) for of_source in counts):,} images",
    ]
