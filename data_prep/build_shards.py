# SPDX-License-Identifier: Apache-2.0
"""EVE/LLaVA annotations and an image folder -> a folder of MDS shards that the trainer reads.

    OUT/index.json          all shards of all parts, in order; written last: its presence means "complete"
    OUT/dataset.json        input, options, counts, quarantine reasons
    OUT/quarantine.jsonl    one line per entry that did not become a row
    OUT/part-00000/         shard.*.mds, index.json, part.json, quarantine.jsonl

Every entry of the input ends either in the shards or in quarantine. To go on with a killed build run the same command
again: finished parts are kept, and the result has the same bytes as an uninterrupted build. Refused: a folder that
holds something else, or parts of another input or other options; two builds in one folder at a time. With `overwrite` a
finished folder stays until the new one is whole: that is built beside it, restartable in the same way.
"""

import itertools
import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eve.errors import DataError
from megatron_eve.folder_lock import only_one
from megatron_eve.whole import mend, publish_folder, whole_file, write_json

from .build_options import BuildOptions
from .ownership import DATASET_FILE, claim, is_whole, staging_folder
from .parts import (
    INDEX_FILE,
    QUARANTINE_FILE,
    Counts,
    PartJob,
    build_part,
    entries_hash,
    part_name,
    read_part,
)
from .quarantine import QuarantineRecord
from .readers import InputSummary, iterate_entries, scan_input
from .samples import check_entry
from .workers import worker_processes

DRY_RUN_SAMPLES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """The contents of a finished build."""

    counts: Counts
    num_parts: int
    num_shards: int
    num_kept_parts: int  # finished by an earlier run


def dry_run(options: BuildOptions) -> list[str]:
    """Plan the build, check its first samples, write nothing. Returns the lines to print."""
    summary = scan_input(options.data)
    entries = itertools.islice(iterate_entries(options.data), DRY_RUN_SAMPLES)
    checked = [check_entry(entry, context=options.context) for entry in entries]
    refused = [record for record in checked if isinstance(record, QuarantineRecord)]
    return [
        *options.plan_lines(summary),
        f"first {len(checked):,} samples = {len(checked) - len(refused):,} good + {len(refused):,} "
        "for quarantine",
        *(f"  {record.id}: {record.reason}: {record.message}" for record in refused[:10]),
        f"dry run: nothing was written to {options.out}",
    ]


def build_shards(options: BuildOptions, *, overwrite: bool = False) -> BuildReport:
    """Build, or go on building, the shard folder `options.out`.

    Raises: ConfigError if the folder is taken or belongs to another build; DataError if the input is broken as a whole,
    files cannot be accessed, or no sample is good.
    """
    summary = scan_input(options.data)
    if summary.num_entries == 0:
        raise DataError(f"{options.data} holds no samples; there is nothing to build.")
    for line in options.plan_lines(summary):
        print(line, file=sys.stderr)
    final = options.out.resolve()  # of a link, what it points to is replaced
    mend(final)
    final.mkdir(parents=True, exist_ok=True)
    identity = options.identity(summary)
    with only_one(options.out, what="build"):
        if overwrite and is_whole(options.out, identity=identity):
            staged = replace(options, out=staging_folder(options.out, identity=identity))
            with only_one(staged.out, what="build"):
                report = _build(staged, summary=summary)
            publish_folder(staged.out, final=final)
            return report
        claim(options.out, identity=identity, overwrite=overwrite)
        return _build(options, summary=summary)


def _build(options: BuildOptions, *, summary: InputSummary) -> BuildReport:
    """Build in a folder that this build owns."""
    num_kept = _build_parts(options, summary=summary)
    return _finish(options, summary=summary, num_kept=num_kept)


def _build_parts(options: BuildOptions, *, summary: InputSummary) -> int:
    """Build the parts that are missing. Returns how many were there already."""
    num_kept = 0
    progress = _Progress(num_samples=summary.num_entries, num_parts=options.num_parts(summary))
    waiting: deque[tuple[int, Future[Counts]]] = deque()
    with worker_processes(build_part, num_workers=options.workers) as submit:
        for job in _jobs(options, summary=summary):
            folder = options.out / part_name(job.number)
            if folder.is_dir():
                progress.report(job.number, _kept_counts(folder, job=job), state="kept")
                num_kept += 1
                continue
            waiting.append((job.number, submit(job)))
            while len(waiting) > 2 * options.workers:
                _await_first(waiting, progress=progress)
        while waiting:
            _await_first(waiting, progress=progress)
    progress.bar.close()
    return num_kept


def _jobs(options: BuildOptions, *, summary: InputSummary) -> Iterator[PartJob]:
    entries = iterate_entries(options.data)
    for number in range(options.num_parts(summary)):
        yield PartJob(
            number=number,
            entries=list(itertools.islice(entries, options.samples_per_part)),
            out=options.out,
            shard_bytes=options.shard_bytes,
            context=options.context,
        )


def _kept_counts(folder: Path, *, job: PartJob) -> Counts:
    counts, digest = read_part(folder)
    if digest != entries_hash(job.entries):
        raise DataError(f"{folder} was made from other samples; delete that folder and run again.")
    return counts


def _await_first(waiting: "deque[tuple[int, Future[Counts]]]", *, progress: "_Progress") -> None:
    number, future = waiting.popleft()
    try:
        progress.report(number, future.result(), state="done")
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker died while it built {part_name(number)} or a part near it (out of memory?); "
            "run the same command again, with fewer --workers if memory was short."
        ) from error


class _Progress:
    """On stderr: a bar on a terminal, else one line per part."""

    def __init__(self, *, num_samples: int, num_parts: int) -> None:
        self.num_parts, self.num_samples = num_parts, num_samples
        self.total = Counts()
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=num_samples, unit="sample", file=sys.stderr, disable=not self.is_terminal
        )

    def report(self, number: int, counts: Counts, *, state: str) -> None:
        self.total.add(counts)
        self.bar.update(counts.entries)
        self.bar.set_postfix(quarantined=self.total.num_quarantined)
        if not self.is_terminal:
            print(
                f"{part_name(number)} {state} ({number + 1:,}/{self.num_parts:,}) | samples "
                f"{self.total.entries:,}/{self.num_samples:,} | quarantined "
                f"{self.total.num_quarantined:,}",
                file=sys.stderr,
                flush=True,
            )


def _finish(options: BuildOptions, *, summary: InputSummary, num_kept: int) -> BuildReport:
    """Add up the parts' counts, join their quarantines and indices; publish the index last."""
    out, total = options.out, Counts()
    shards: list[dict[str, Any]] = []
    folders = [out / part_name(number) for number in range(options.num_parts(summary))]
    for folder in folders:
        total.add(read_part(folder)[0])
        shards += _part_shards(folder)
    rows = sum(shard["samples"] for shard in shards)
    if total.entries != summary.num_entries or total.samples != rows:
        raise DataError(
            f"{out} does not add up: {summary.num_entries:,} samples in the input, {total.entries:,} "
            f"in the parts, {rows:,} rows in shards; delete the folder and build again."
        )
    _join_files([folder / QUARANTINE_FILE for folder in folders], out=out / QUARANTINE_FILE)
    content = {
        **options.identity(summary),
        "complete": total.samples > 0,
        "parts": len(folders),
        "shards": len(shards),
        "counts": asdict(total),
    }
    write_json(out / DATASET_FILE, content)
    if total.samples == 0:
        raise DataError(
            f"all {total.entries:,} samples went to quarantine ({_reasons(total)}), the first one because "
            f"{_first_refusal(out / QUARANTINE_FILE)}; see {out / QUARANTINE_FILE}, repair the input and build with "
            "--overwrite."
        )
    write_json(out / INDEX_FILE, {"version": 2, "shards": shards}, indent=None)
    return BuildReport(
        counts=total, num_parts=len(folders), num_shards=len(shards), num_kept_parts=num_kept
    )


def _join_files(paths: list[Path], *, out: Path) -> None:
    """Write the files one after another; `out` appears whole or not at all."""
    with whole_file(out, "wb") as file:
        for path in paths:
            file.write(path.read_bytes())


def _part_shards(folder: Path) -> list[dict[str, Any]]:
    """The shards of a part as the joint index names them: files relative to the whole folder."""
    shards = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["shards"]
    for shard in shards:
        shard["raw_data"]["basename"] = f"{folder.name}/{shard['raw_data']['basename']}"
    return list(shards)


def _first_refusal(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        message = json.loads(next(file))["message"]
    return str(message)[:400]


def _reasons(counts: Counts) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in counts.quarantined.items())


def report_lines(report: BuildReport, *, out: Path) -> list[str]:
    """The lines for the user at the end; the last one says what was written where."""
    counts = report.counts
    lines = [
        f"{counts.entries:,} samples = {counts.samples:,} in shards + {counts.num_quarantined:,} "
        "in quarantine"
    ]
    if counts.quarantined:
        lines.append(f"quarantine: {_reasons(counts)}")
    if counts.changed:
        changed = ", ".join(f"{name} {number:,}" for name, number in counts.changed.items())
        lines.append(f"re-encoded images: {changed}")
    if counts.unknown_keys:
        keys = ", ".join(f"{name} {number:,}" for name, number in counts.unknown_keys.items())
        lines.append(f"keys that are not read, and in how many samples: {keys}")
    if counts.plain_only:
        lines.append(
            f"{counts.plain_only:,} samples have an image without a mark, or no question: template plain trains them, "
            "qwen2 refuses them"
        )
    kept = f" ({report.num_kept_parts:,} kept from before)" if report.num_kept_parts else ""
    lines.append(
        f"wrote {report.num_shards:,} shards in {report.num_parts:,} parts{kept} with "
        f"{counts.images:,} images ({counts.image_bytes:,} bytes) to {out}"
    )
    return lines
