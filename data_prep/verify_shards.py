# SPDX-License-Identifier: Apache-2.0
"""Is a shard folder what its builder wrote? Hashes every shard, decodes every row, compares counts and file lists, and
each image with the size in its row, as the trainer reads it (an older build may have read it otherwise).

In: a folder made by build-shards. Out: the list of problems, empty if there are none. The trainer only compares file
sizes when it starts; this is the thorough check, after a copy or when a disk is in doubt.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_eve.data.read.image import image_size
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.row import from_row
from megatron_eve.data.read.shard_record import built_exif_rotation
from megatron_eve.data.read.streaming_import import reader_from_json
from megatron_eve.data.sample import Sample
from megatron_eve.errors import DataError

from .ownership import DATASET_FILE, refuse_unfinished
from .parts import INDEX_FILE, QUARANTINE_FILE, SHARD_HASH

READ_BYTES = 1 << 22


@dataclass(kw_only=True, slots=True)
class Verification:
    """What was checked, and what is wrong with it. Filled shard by shard."""

    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_shards(folder: Path) -> Verification:
    """Check the whole folder. Raises DataError if it has no index, so that there is nothing to check against."""
    index, dataset = read_index(folder), _read_json(folder / DATASET_FILE)
    result = Verification()
    exif_rotation = built_exif_rotation(folder)
    for shard in index["shards"]:
        _verify_shard(folder, shard, exif_rotation=exif_rotation, result=result)
    _verify_files(folder, index["shards"], result=result)
    _verify_counts(folder, dataset, result=result)
    return result


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a complete shard folder."""
    refuse_unfinished(folder)
    content = _read_json(folder / INDEX_FILE)
    if not isinstance(content.get("shards"), list):
        raise DataError(f"{folder / INDEX_FILE} has no list `shards`; build the folder again.")
    return content


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); restore it or build again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold a JSON object; restore it or build again.")
    return content


def _verify_shard(
    folder: Path, shard: dict[str, Any], *, exif_rotation: bool, result: Verification
) -> None:
    name = shard["raw_data"]["basename"]
    path = folder / name
    result.num_shards += 1
    if not path.is_file():
        result.problems.append(f"{name}: missing")
        return
    size, expected = path.stat().st_size, shard["raw_data"]["bytes"]
    result.num_bytes += size
    if size != expected:
        result.problems.append(f"{name}: {size:,} bytes, the index says {expected:,}")
        return
    digest, wanted = _hash_file(path), shard["raw_data"]["hashes"][SHARD_HASH]
    if digest != wanted:
        result.problems.append(f"{name}: {SHARD_HASH} is {digest}, the index says {wanted}")
        return
    _verify_rows(folder, shard, exif_rotation=exif_rotation, result=result)


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _verify_rows(
    folder: Path, shard: dict[str, Any], *, exif_rotation: bool, result: Verification
) -> None:
    reader = reader_from_json(str(folder), None, shard)
    name = shard["raw_data"]["basename"]
    for number in range(shard["samples"]):
        try:
            sample = from_row(reader[number])
        except Exception as error:  # whatever the MDS decoder meets in damaged bytes
            result.problems.append(f"{name}: row {number}: {type(error).__name__}: {error}")
            continue
        result.num_samples += 1
        result.num_images += len(sample.images)
        problem = _size_problem(sample, exif_rotation=exif_rotation)
        if problem is not None:
            result.problems.append(f"{name}: row {number}, {sample.id}: {problem}")


def _size_problem(sample: Sample, *, exif_rotation: bool) -> str | None:
    """What the trainer would mask, from headers (PNG and TIFF are decoded); None: nothing."""
    for data, (height, width) in zip(sample.images, sample.image_sizes, strict=True):
        try:
            found = image_size(data, exif_rotation=exif_rotation)
        except SampleError as error:
            return str(error)
        if found != (height, width):
            return f"the image is {found[0]} x {found[1]}, the row says {height} x {width}"
    return None


def _verify_files(folder: Path, shards: list[dict[str, Any]], *, result: Verification) -> None:
    """Shard files that the index does not know, and files that it names twice."""
    named = Counter(shard["raw_data"]["basename"] for shard in shards)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.mds")}
    result.problems += [f"{name}: not in the index" for name in sorted(present - set(named))]
    result.problems += [f"{name}: twice in the index" for name, n in named.items() if n > 1]


def _count_reasons(path: Path, *, result: Verification) -> dict[str, int] | None:
    """Reason -> lines of quarantine.jsonl; None if a line is damaged."""
    counts: Counter[str] = Counter()
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            counts[json.loads(line)["reason"]] += 1
        except (ValueError, KeyError, TypeError) as error:
            result.problems.append(f"{path.name}: line {number}: {type(error).__name__}: {error}")
            return None
    return dict(sorted(counts.items()))


def _verify_counts(folder: Path, dataset: dict[str, Any], *, result: Verification) -> None:
    """Rows and quarantine lines against dataset.json. Rows only where every shard could be read."""
    counts = dataset.get("counts")
    if not isinstance(counts, dict):
        result.problems.append(f"{DATASET_FILE}: no counts, the build is not complete")
        return
    quarantined = _count_reasons(folder / QUARANTINE_FILE, result=result)
    if quarantined is not None and quarantined != counts["quarantined"]:
        result.problems.append(
            f"{QUARANTINE_FILE}: {quarantined}, {DATASET_FILE} says {counts['quarantined']}"
        )
    if not result.problems:
        for what, found in (("samples", result.num_samples), ("images", result.num_images)):
            if found != counts[what]:
                result.problems.append(
                    f"{DATASET_FILE}: {counts[what]:,} {what}, the shards hold {found:,}"
                )
