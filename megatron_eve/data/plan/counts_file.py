# SPDX-License-Identifier: Apache-2.0
"""Counts of consecutive samples (`SourceCounts`), and the file that keeps them.

The file is an uncompressed .npz with a hash over its arrays. It is whole or absent, and any damage is noticed:
`load_counts` raises DamagedCounts and never gives other numbers.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.read.quarantine import UNREADABLE, Quarantined
from megatron_eve.errors import DataError
from megatron_eve.whole import whole_file

_ARRAYS = ("num_text", "num_labels", "num_images", "image_sizes")


class DamagedCounts(Exception):
    """The bytes of a file differ from those written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCounts:
    """Counts of consecutive samples, numbered from the first of them."""

    num_text: NDArray[np.int32]  # [num_samples] without padding; 0 where unfit
    num_labels: NDArray[np.int32]  # [num_samples] of these, tokens to predict
    num_images: NDArray[np.int32]  # [num_samples]; 0 where the row cannot be read
    image_sizes: NDArray[np.uint32]  # [images, 2] height and width in the row, all samples
    unfit: dict[int, Quarantined]  # sample -> why

    @property
    def unreadable(self) -> list[Quarantined]:
        return [entry for entry in self.unfit.values() if entry.reason in UNREADABLE]


def concatenate(pieces: Sequence[SourceCounts]) -> SourceCounts:
    arrays = {name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in _ARRAYS}
    begins = np.cumsum([0, *(piece.num_text.size for piece in pieces)]).tolist()
    unfit = {
        begin + i: entry
        for begin, piece in zip(begins[:-1], pieces, strict=True)
        for i, entry in piece.unfit.items()
    }
    return SourceCounts(**arrays, unfit=unfit)


def cut(counts: SourceCounts, begin: int, end: int, *, ends: NDArray[np.int64]) -> SourceCounts:
    return SourceCounts(
        num_text=counts.num_text[begin:end],
        num_labels=counts.num_labels[begin:end],
        num_images=counts.num_images[begin:end],
        image_sizes=counts.image_sizes[ends[begin] : ends[end]],
        unfit={i - begin: entry for i, entry in counts.unfit.items() if begin <= i < end},
    )


def save_counts(counts: SourceCounts, path: Path) -> None:
    """Raises: DataError."""
    unfit = json.dumps([[i, asdict(entry)] for i, entry in counts.unfit.items()]).encode()
    arrays = {name: getattr(counts, name) for name in _ARRAYS}
    arrays["unfit"] = np.frombuffer(unfit, np.uint8)
    try:
        with whole_file(path, "wb", shared=True) as file:
            np.savez(file, digest=_digest(arrays), **arrays)
    except OSError as error:
        raise DataError(
            f"{path}: what was counted cannot be kept ({error}); make room, or make the folder unwritable "
            "for this user so that XDG_CACHE_HOME is used."
        ) from error


def load_counts(path: Path, *, num_samples: int) -> SourceCounts:
    """Raises: OSError if the system does not give the file; DamagedCounts."""
    content = path.read_bytes()
    try:
        counts = _decoded(content)
    except Exception as error:  # damaged bytes lead the reader of zip files anywhere
        raise DamagedCounts(f"{type(error).__name__}: {error}") from error
    if counts.num_text.size != num_samples:
        raise DamagedCounts(f"{counts.num_text.size} samples, expected {num_samples}")
    return counts


def _decoded(content: bytes) -> SourceCounts:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in (*_ARRAYS, "unfit")}
        digest = file["digest"]
    if _digest(arrays).tobytes() != digest.tobytes():
        raise ValueError("its arrays have another hash")
    unfit = json.loads(arrays.pop("unfit").tobytes())
    return SourceCounts(**arrays, unfit={i: Quarantined(**entry) for i, entry in unfit})


def _digest(arrays: dict[str, NDArray[np.generic]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)
