# SPDX-License-Identifier: Apache-2.0
"""How many vision, text and label tokens each sample has, and which samples are unfit: what the plan needs.

Comes in: a ShardTable, a tokenizer, the settings that decide. Every sample's text is encoded once; image sizes come
from the rows; no image byte is read. Goes out: `SampleLengths`. Cached per source as `lengths-<fingerprint>.npz` beside
its index.json, or, where that folder cannot be written, in the user's cache folder. A lock lets one process compute
while the others wait. Text is encoded as conversation.py does it for training, so the two cannot disagree.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import DataConfig, ModelConfig, TemplateName
from megatron_eve.data.conversation import EncodedSample, encode_samples
from megatron_eve.data.image_size import check_image_size, train_size
from megatron_eve.data.packing import PackShape
from megatron_eve.data.quarantine import Quarantined, SampleError
from megatron_eve.data.sample import Sample, image_token_count
from megatron_eve.data.shards import ShardTable
from megatron_eve.data.tokenizer import Tokenizer
from megatron_eve.whole import whole_file

_LOG = logging.getLogger(__name__)
_FORMAT = 3  # change it when the same settings would give other numbers
_CHUNK = 2048  # samples that go through the tokenizer together
_LOG_EVERY = 100_000


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

    def padding(self, num_tokens: int) -> int:
        """Padding tokens behind a sample of `num_tokens`."""
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
    sizes = []
    for height, width in sample.image_sizes:
        check_image_size(height, width, max_aspect_ratio=settings.max_aspect_ratio)
        sizes.append(
            train_size(
                height,
                width,
                edge=settings.image_edge,
                pixels_per_token=settings.pixels_per_token,
            )
        )
    return sizes


def load_lengths(
    table: ShardTable,
    *,
    settings: Sequence[LengthSettings],
    tokenizer: Tokenizer,
    shape: PackShape,
) -> SampleLengths:
    """Lengths of all samples of a table, from the caches where they exist; what no pack holds is `too_long`.

    `settings`: of each source."""
    parts = [
        _cached_source_lengths(table, source, settings=of_source, tokenizer=tokenizer)
        for source, of_source in enumerate(settings)
    ]
    num_vision = np.concatenate([part.num_vision for part in parts])
    num_text = np.concatenate([part.num_text for part in parts])
    num_labels = np.concatenate([part.num_labels for part in parts])
    unfit: dict[int, Quarantined] = {}
    for source, part in enumerate(parts):
        begin, _ = table.source_range(source)
        unfit.update({begin + i: entry for i, entry in part.unfit.items()})
    for i in _too_long(num_vision, num_text, shape=shape):
        message = (
            f"{num_vision[i]} vision and {num_text[i]} text tokens, padded to multiples of "
            f"{shape.align}, do not fit into a pack of {shape.pack_tokens}"
        )
        header = table.read_header(i)
        unfit[i] = Quarantined(header.id, header.source, "too_long", message)
    fit = np.ones(num_text.size, dtype=bool)
    fit[list(unfit)] = False
    return SampleLengths(
        num_vision * fit, num_text * fit, num_labels * fit, dict(sorted(unfit.items()))
    )


def _too_long(
    num_vision: NDArray[np.int32], num_text: NDArray[np.int32], *, shape: PackShape
) -> list[int]:
    align = shape.align
    blocks = np.maximum(-(-num_vision // align), 1) + np.maximum(-(-num_text // align), 1)
    too_long: list[int] = np.flatnonzero(blocks * align > shape.pack_tokens).tolist()
    return too_long


def _cached_source_lengths(
    table: ShardTable, source: int, *, settings: LengthSettings, tokenizer: Tokenizer
) -> SampleLengths:
    """Lengths of one source, numbered from its own first sample."""
    folder = table.folders[source]
    index_text = (folder / "index.json").read_bytes()
    decisive = repr((_FORMAT, tokenizer.fingerprint, sorted(asdict(settings).items())))
    fingerprint = hashlib.sha256(index_text + decisive.encode()).hexdigest()[:16]
    path = _cache_folder(folder) / f"lengths-{fingerprint}.npz"
    if path.is_file():
        return _load(path)
    with filelock.FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            lengths = _compute(table, source, settings=settings, tokenizer=tokenizer)
            _save(lengths, path)
        return _load(path)


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


def _compute(
    table: ShardTable, source: int, *, settings: LengthSettings, tokenizer: Tokenizer
) -> SampleLengths:
    begin, end = table.source_range(source)
    num_vision = np.zeros(end - begin, np.int32)
    num_text = np.zeros(end - begin, np.int32)
    num_labels = np.zeros(end - begin, np.int32)
    unfit: dict[int, Quarantined] = {}
    _LOG.info("counting the tokens of %s samples in %s", f"{end - begin:,}", table.folders[source])
    for first in range(begin, end, _CHUNK):
        headers = [table.read_header(i) for i in range(first, min(first + _CHUNK, end))]
        for i, result in _measure(headers, settings=settings, tokenizer=tokenizer):
            if isinstance(result, SampleError):
                header = headers[i]
                entry = Quarantined(header.id, header.source, result.reason, result.message)
                unfit[first - begin + i] = entry
            else:
                at = first - begin + i
                num_vision[at], num_text[at], num_labels[at] = result
        if (first - begin) // _LOG_EVERY != (first - begin + _CHUNK) // _LOG_EVERY:
            _LOG.info("counted %s of %s samples", f"{first - begin + _CHUNK:,}", f"{end - begin:,}")
    return SampleLengths(num_vision, num_text, num_labels, unfit)


def _measure(
    headers: list[Sample], *, settings: LengthSettings, tokenizer: Tokenizer
) -> Iterator[tuple[int, tuple[int, int, int] | SampleError]]:
    """(number, (vision, text, label tokens) or the reason why not) of each sample."""
    encoded = encode_samples(
        headers,
        template=settings.template,
        tokenizer=tokenizer,
        max_text_tokens=settings.max_text_tokens,
    )
    for i, (header, text) in enumerate(zip(headers, encoded, strict=True)):
        if not isinstance(text, EncodedSample):
            yield i, text
            continue
        try:
            sizes = target_sizes(header, settings=settings)
        except SampleError as error:
            yield i, error
            continue
        pixels = settings.pixels_per_token
        vision = sum(image_token_count(h, w, pixels_per_token=pixels) for h, w in sizes)
        padding = settings.padding(vision + text.num_text)
        yield i, (vision, text.num_text + padding, text.num_labels)


def _save(lengths: SampleLengths, path: Path) -> None:
    """Write the cache under a temporary name, then rename: a reader never sees half a file."""
    unfit = [[i, asdict(entry)] for i, entry in lengths.unfit.items()]
    with whole_file(path, "wb", shared=True) as file:
        np.savez(
            file,
            num_vision=lengths.num_vision,
            num_text=lengths.num_text,
            num_labels=lengths.num_labels,
            unfit=np.frombuffer(json.dumps(unfit).encode(), np.uint8),
        )


def _load(path: Path) -> SampleLengths:
    with np.load(path, allow_pickle=False) as arrays:
        unfit = json.loads(arrays["unfit"].tobytes())
        return SampleLengths(
            num_vision=arrays["num_vision"],
            num_text=arrays["num_text"],
            num_labels=arrays["num_labels"],
            unfit={i: Quarantined(**entry) for i, entry in unfit},
        )
