# SPDX-License-Identifier: Apache-2.0
"""How many vision, text and label tokens each sample has, and which samples are unfit: what the plan needs.

Comes in: a ShardTable, a tokenizer, settings. Goes out: `SampleLengths`. Text tokens come from counting.py, which
counts every sample once and keeps it. Vision tokens are computed here from the sizes of the images, at every start and
once for each size, and so are padding and which samples fit into a pack.

At its start the trainer counts at most `START_LIMIT` samples, about a minute on one core, and no rank waits for it in a
collective (training/data_start.py). For more, the refusal names the command that counts with all cores.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import DataConfig, ModelConfig, TemplateName
from megatron_eve.data.plan.counting import Alive, CountedSource, TextSettings, too_many_unreadable
from megatron_eve.data.plan.counts_file import SourceCounts
from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.image_size import check_image_size, train_size
from megatron_eve.data.read.quarantine import UNREADABLE, Quarantined, SampleError
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Sample, image_token_count
from megatron_eve.errors import ConfigError

START_LIMIT = 250_000
"""Samples that the trainer counts at its start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthSettings:
    """Everything beside shards and tokenizer that decides how many tokens a sample has."""

    template: TemplateName
    image_edge: int
    max_aspect_ratio: float
    max_text_tokens: int
    pixels_per_token: int
    sample_align: int = 1  # samples are padded with text to a multiple of it

    @classmethod
    def of_sources(cls, data: DataConfig, *, model: ModelConfig) -> tuple["LengthSettings", ...]:
        """One for each source, in order."""
        return tuple(
            cls(
                template=source.template or data.template,
                image_edge=data.image_edge,
                max_aspect_ratio=data.max_aspect_ratio,
                max_text_tokens=data.max_text_tokens,
                pixels_per_token=model.pixels_per_token,
                sample_align=data.sample_align,
            )
            for source in data.sources
        )

    @property
    def text(self) -> TextSettings:
        """The part that decides about text."""
        return TextSettings(template=self.template, max_text_tokens=self.max_text_tokens)

    def padding(self, num_tokens: int) -> int:
        """Padding tokens after a sample of `num_tokens`."""
        return -num_tokens % self.sample_align


@dataclass(frozen=True, slots=True)
class SampleLengths:
    """Token counts of every sample of a table, and the samples that training leaves out."""

    num_vision: NDArray[np.int32]  # [num_samples]; 0 where unfit
    num_text: NDArray[np.int32]  # [num_samples] with each sample's padding; 0 where unfit
    num_labels: NDArray[np.int32]  # [num_samples] of these, tokens to predict; 0 where unfit
    unfit: dict[int, Quarantined]  # global sample index -> why

    @property
    def usable(self) -> NDArray[np.bool_]:
        """[num_samples] whether a sample is trained on."""
        mask = np.ones(self.num_text.size, dtype=bool)
        mask[list(self.unfit)] = False
        return mask

    @property
    def reasons(self) -> Counter[str]:
        """How many samples are left out, by reason."""
        return Counter(entry.reason for entry in self.unfit.values())


def target_sizes(sample: Sample, *, settings: LengthSettings) -> list[tuple[int, int]]:
    """(height, width) in pixels of each image after the training resize. Raises SampleError for an unfit image."""
    return resized(sample.image_sizes, settings=settings)


def resized(sizes: Sequence[tuple[int, int]], *, settings: LengthSettings) -> list[tuple[int, int]]:
    """The same of sizes in the row."""
    targets = []
    for height, width in sizes:
        check_image_size(height, width, max_aspect_ratio=settings.max_aspect_ratio)
        edge, pixels = settings.image_edge, settings.pixels_per_token
        targets.append(train_size(height, width, edge=edge, pixels_per_token=pixels))
    return targets


def unreadable_limit(share: float, *, num_samples: int) -> int:
    """data.max_unreadable as a number of samples, rounded up: 0 only if the share is 0."""
    return math.ceil(round(share * num_samples, 6))


def load_lengths(
    table: ShardTable,
    *,
    settings: Sequence[LengthSettings],
    tokenizer: Tokenizer,
    shape: PackShape,
    max_unreadable: int,
    start_limit: int | None = None,
    share: float = 0.0,
    alive: Alive = lambda: None,
) -> SampleLengths:
    """Lengths of all samples of a table; what was not counted yet is counted. What no pack holds is `too_long`.

    `settings`: of each source. `start_limit`: refuse to count more samples than that. `share`, `alive`: see
    counting.CountedSource. Raises: DataError, also if more than `max_unreadable` rows could not be read; ConfigError
    beyond `start_limit`: starting again does not help."""
    counted = [
        CountedSource(
            table,
            source,
            settings=of_source.text,
            tokenizer=tokenizer,
            max_unreadable=max_unreadable,
        )
        for source, of_source in enumerate(settings)
    ]
    if start_limit is not None:
        _refuse_long_counting(counted, limit=start_limit, tokenizer=tokenizer)
    lengths = _Lengths(table)
    for source, (counts, of_source) in enumerate(zip(counted, settings, strict=True)):
        lengths.add(source, counts.load(share=share, alive=alive), settings=of_source)
    return lengths.finished(shape=shape, max_unreadable=max_unreadable)


class _Lengths:
    """Lengths of a table, source by source."""

    def __init__(self, table: ShardTable) -> None:
        self._table = table
        self._columns: list[NDArray[np.int32]] = []  # of each source [3, num_samples]
        self._unfit: dict[int, Quarantined] = {}

    def add(self, source: int, counts: SourceCounts, *, settings: LengthSettings) -> None:
        begin, _ = self._table.source_range(source)
        num_vision, bad_images = _vision_tokens(counts, settings=settings)
        num_text = counts.num_text + (-(num_vision + counts.num_text) % settings.sample_align)
        self._columns.append(np.stack([num_vision, num_text, counts.num_labels]))
        self._unfit.update({begin + i: entry for i, entry in counts.unfit.items()})
        for i, error in bad_images.items():
            if i not in counts.unfit:
                self._leave_out(begin + i, error)

    def finished(self, *, shape: PackShape, max_unreadable: int) -> SampleLengths:
        unreadable = [entry for entry in self._unfit.values() if entry.reason in UNREADABLE]
        if len(unreadable) > max_unreadable:
            then = "Repair them and run `megatron-eve data count` with --again"
            raise too_many_unreadable(unreadable, allowed=max_unreadable, then=then)
        num_vision, num_text, num_labels = np.concatenate(self._columns, axis=1)
        for i in _too_long(num_vision, num_text, shape=shape):
            message = (
                f"{num_vision[i]} vision and {num_text[i]} text tokens, padded to multiples of "
                f"{shape.align}, do not fit into a pack of {shape.pack_tokens}"
            )
            if i not in self._unfit:
                self._leave_out(i, SampleError("too_long", message))
        fit = np.ones(num_text.size, dtype=bool)
        fit[list(self._unfit)] = False
        unfit = dict(sorted(self._unfit.items()))
        return SampleLengths(num_vision * fit, num_text * fit, num_labels * fit, unfit)

    def _leave_out(self, index: int, error: SampleError) -> None:
        file, row = self._table.place(index)
        self._unfit[index] = Quarantined("", "", error.reason, error.message, str(file), row)


def _vision_tokens(
    counts: SourceCounts, *, settings: LengthSettings
) -> tuple[NDArray[np.int32], dict[int, SampleError]]:
    """[num_samples] vision tokens, and for samples with an unfit image the reason (of the first such image)."""
    heights, widths = counts.image_sizes.astype(np.uint64).T
    sizes, size_of = np.unique(heights << 32 | widths, return_inverse=True)
    measured = list(_image_tokens(sizes, settings=settings))
    is_bad = np.array([not isinstance(tokens, int) for tokens in measured], bool)
    tokens = np.array([tokens if isinstance(tokens, int) else 0 for tokens in measured], np.int64)
    before = np.append(0, np.cumsum(tokens[size_of]))  # [images + 1]
    begins = np.append(0, np.cumsum(counts.num_images, dtype=np.int64))
    num_vision = (before[begins[1:]] - before[begins[:-1]]).astype(np.int32)
    errors: dict[int, SampleError] = {}
    for image in np.flatnonzero(is_bad[size_of]).tolist():
        error = measured[size_of[image]]
        assert isinstance(error, SampleError)
        errors.setdefault(int(np.searchsorted(begins, image, side="right")) - 1, error)
    return num_vision, errors


def _image_tokens(
    sizes: NDArray[np.uint64], *, settings: LengthSettings
) -> Iterator[int | SampleError]:
    """Tokens of an image of each height << 32 | width, or why it is unfit."""
    for size in sizes.tolist():
        try:
            ((rows, cols),) = resized([divmod(size, 1 << 32)], settings=settings)
        except SampleError as error:
            yield error
        else:
            yield image_token_count(rows, cols, pixels_per_token=settings.pixels_per_token)


def _refuse_long_counting(
    counted: Sequence[CountedSource], *, limit: int, tokenizer: Tokenizer
) -> None:
    """Raises ConfigError with the command that counts, if there is too much to count for the trainer."""
    missing = {source: source.missing_samples() for source in counted if source.missing_samples()}
    total = sum(missing.values())
    if total <= limit:
        return
    groups: dict[TextSettings, list[str]] = {}
    for source in missing:
        groups.setdefault(source.settings, []).append(str(source.folder))
    commands = " && ".join(
        f"megatron-eve data count {shlex.join(folders)} --tokenizer {shlex.quote(str(tokenizer.folder))} "
        f"--template {text.template} --max-text-tokens {text.max_text_tokens}"
        for text, folders in groups.items()
    )
    raise ConfigError(
        f"the tokens of {total:,} samples are not counted yet, and the trainer counts at most {limit:,} at its start; "
        f"run this once, which keeps what it counts, and start again: {commands}"
    )


def _too_long(
    num_vision: NDArray[np.int32], num_text: NDArray[np.int32], *, shape: PackShape
) -> list[int]:
    align = shape.align
    blocks = np.maximum(-(-num_vision // align), 1) + np.maximum(-(-num_text // align), 1)
    too_long: list[int] = np.flatnonzero(blocks * align > shape.pack_tokens).tolist()
    return too_long
