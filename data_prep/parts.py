# SPDX-License-Identifier: Apache-2.0
"""One part of a shard folder: the unit of work, of restart and of atomicity.

A part is written under a temporary name (`.tmp-part-00003.PID`), synced, and renamed to `part-00003`; so it is whole or
absent, and its bytes depend on nothing but its entries, their images and the options. Inside: shard.*.mds and
index.json from mosaicml-streaming's MDSWriter, part.json (counts, and a hash of the entries), quarantine.jsonl.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_eve.data.read.row import MDS_COLUMNS, to_row
from megatron_eve.data.read.streaming_import import MDSWriter
from megatron_eve.errors import DataError
from megatron_eve.whole import TEMPORARY_PREFIX, publish_folder

from .ownership import INDEX_FILE as INDEX_FILE
from .ownership import QUARANTINE_FILE
from .quarantine import QuarantineRecord
from .readers import RawEntry
from .samples import CheckedSample, SampleContext, check_entry

MAX_KEYS = 100
OTHER_KEYS = "(other keys)"
SHARD_HASH = "xxh3_64"
PART_FILE = "part.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartJob:
    """What a worker needs to build one part."""

    number: int
    entries: Sequence[RawEntry]
    out: Path
    shard_bytes: int
    context: SampleContext


@dataclass(kw_only=True, slots=True)
class Counts:
    """What became of the entries. Filled while a part is written; parts are added up at the end."""

    entries: int = 0
    samples: int = 0  # rows in shards
    text_only: int = 0  # of these, rows without an image
    images: int = 0
    image_bytes: int = 0
    turns: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)  # reason -> entries
    changed: dict[str, int] = field(default_factory=dict)  # change -> images
    unknown_keys: dict[str, int] = field(default_factory=dict)  # unread key -> rows
    plain_only: int = 0  # rows that template qwen2 refuses: an image without a mark, or no question

    def add(self, other: "Counts") -> None:
        self.entries += other.entries
        self.samples += other.samples
        self.text_only += other.text_only
        self.images += other.images
        self.image_bytes += other.image_bytes
        self.turns += other.turns
        self.quarantined = _sum(self.quarantined, other.quarantined)
        self.changed = _sum(self.changed, other.changed)
        self.unknown_keys = _few(_sum(self.unknown_keys, other.unknown_keys))
        self.plain_only += other.plain_only

    def add_sample(self, checked: CheckedSample) -> None:
        sample = checked.sample
        self.samples += 1
        self.text_only += not sample.images
        self.images += len(sample.images)
        self.image_bytes += sum(map(len, sample.images))
        self.turns += len(sample.turns)
        if checked.changes:
            self.changed = _sum(self.changed, Counter(checked.changes))
        if checked.unknown_keys:
            self.unknown_keys = _few(_sum(self.unknown_keys, Counter(checked.unknown_keys)))
        self.plain_only += checked.templates == ("plain",)

    @property
    def num_quarantined(self) -> int:
        return sum(self.quarantined.values())


def _sum(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(left) + Counter(right)).items()))


def _few(counts: dict[str, int]) -> dict[str, int]:
    """At most MAX_KEYS names, the first of the alphabet; the rest together. Input whose keys are data has many."""
    names = [name for name in counts if name != OTHER_KEYS]
    if len(names) <= MAX_KEYS:
        return counts
    kept = {name: counts[name] for name in names[:MAX_KEYS]}
    return {**kept, OTHER_KEYS: sum(counts.values()) - sum(kept.values())}


def part_name(number: int) -> str:
    return f"part-{number:05d}"


def entries_hash(entries: Sequence[RawEntry]) -> str:
    """Identifies the entries that a part was made from."""
    text = json.dumps([[entry.index, entry.value, entry.error] for entry in entries])
    return hashlib.sha256(text.encode()).hexdigest()


def read_part(folder: Path) -> tuple[Counts, str]:
    """The counts of a finished part, and the hash of the entries that it was made from."""
    path = folder / PART_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Counts(**content["counts"]), content["entries_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be used ({type(error).__name__}: {error}); delete the folder {folder} and run again."
        ) from error


def build_part(job: PartJob) -> Counts:
    """Write one part and return its counts."""
    final = job.out / part_name(job.number)
    temporary = job.out / f"{TEMPORARY_PREFIX}{final.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        counts = _write_part(job, folder=temporary)
        publish_folder(temporary, final=final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _write_part(job: PartJob, *, folder: Path) -> Counts:
    counts, refused = Counts(entries=len(job.entries)), []
    writer = MDSWriter(
        columns=MDS_COLUMNS, out=str(folder), hashes=[SHARD_HASH], size_limit=job.shard_bytes
    )
    with writer:
        for entry in job.entries:
            checked = check_entry(entry, context=job.context)
            if isinstance(checked, QuarantineRecord):
                refused.append(checked)
                continue
            writer.write(to_row(checked.sample))
            counts.add_sample(checked)
    counts.quarantined = dict(sorted(Counter(record.reason for record in refused).items()))
    assert counts.entries == counts.samples + counts.num_quarantined
    with (folder / QUARANTINE_FILE).open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(record.as_json(), ensure_ascii=False) + "\n" for record in refused
        )
    content = {
        "part": job.number,
        "entries_sha256": entries_hash(job.entries),
        "counts": asdict(counts),
    }
    (folder / PART_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return counts
