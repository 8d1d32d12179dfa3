# SPDX-License-Identifier: Apache-2.0
"""The options of a build of shards, what identifies it, and its plan as arithmetic."""

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eve.errors import ConfigError

from .formats import address_of, describe_image_folder
from .images import ImageLimits
from .readers import InputSummary
from .samples import SampleContext

BUILDER_VERSION = 2
"""Raised when the same input and options would give other bytes."""

MAX_SHARD_BYTES = (1 << 32) - (1 << 20)
"""MDS stores offsets in 32 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What to build from what. Everything but `workers` decides the resulting bytes."""

    data: Path
    image_folder: Path
    out: Path
    source: str
    samples_per_part: int
    shard_bytes: int
    limits: ImageLimits
    workers: int
    ignored_keys: tuple[str, ...] = ()  # unknown keys that hold nothing to learn from

    def __post_init__(self) -> None:
        for flag, value in (
            ("--samples-per-part", self.samples_per_part),
            ("--shard-bytes", self.shard_bytes),
            ("--workers", self.workers),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value} is below 1; give a positive number.")
        if self.shard_bytes > MAX_SHARD_BYTES:
            raise ConfigError(
                f"--shard-bytes {self.shard_bytes} is above {MAX_SHARD_BYTES}, the most that MDS "
                "can address; 64 to 256 MiB are usual."
            )
        if not self.image_folder.is_dir():
            raise ConfigError(f"{describe_image_folder(self.image_folder)}.")
        address = address_of(self.out)
        if address is not None:
            raise ConfigError(f"{address} is an address; give a folder on a disk to write to.")

    @property
    def context(self) -> SampleContext:
        """The context for the checks of single samples."""
        return SampleContext(
            image_folder=self.image_folder,
            json_folder=self.data.parent,
            source=self.source,
            limits=self.limits,
            ignored_keys=self.ignored_keys,
        )

    def num_parts(self, summary: InputSummary) -> int:
        return -(-summary.num_entries // self.samples_per_part)

    def identity(self, summary: InputSummary) -> dict[str, object]:
        """Must be equal for two runs to work on the same shard folder."""
        return {
            "builder_version": BUILDER_VERSION,
            "input": {
                "file": str(self.data.resolve()),
                "sha256": summary.sha256,
                "samples": summary.num_entries,
            },
            "image_folder": str(self.image_folder.resolve()),
            "options": {
                "source": self.source,
                "samples_per_part": self.samples_per_part,
                "shard_bytes": self.shard_bytes,
                "ignored_keys": list(self.ignored_keys),
                **asdict(self.limits),
            },
        }

    def plan_lines(self, summary: InputSummary) -> list[str]:
        """The plan as arithmetic, for the user."""
        return [
            f"input {self.data}: {summary.num_entries:,} samples, sha256 {summary.sha256[:16]}…",
            f"{self.num_parts(summary):,} parts = ceil({summary.num_entries:,} / "
            f"{self.samples_per_part:,}), shards of at most {self.shard_bytes:,} bytes, "
            f"{self.workers} workers, images checked by {self.limits.validate}",
        ]
