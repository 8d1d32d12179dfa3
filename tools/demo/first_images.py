# SPDX-License-Identifier: Apache-2.0
"""The first images of an annotation file, for a run that only checks that everything works.

python -m tools.demo.first_images captions_train.json first/captions_train.json --images 40"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.readers import iterate_entries
from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import DataError
from megatron_eve.whole import write_json


def first_images(source: Path, dest: Path, *, num_images: int) -> int:
    """Copy the entries about the first `num_images` images; returns their number."""
    kept: list[dict[str, object]] = []
    images: set[object] = set()
    for entry in iterate_entries(source):
        if not isinstance(entry.value, dict) or "image" not in entry.value:
            raise DataError(f"{source}: entry {entry.index} has no `image`; expected a sample.")
        images.add(entry.value["image"])
        if len(images) > num_images:
            break
        kept.append(entry.value)
    dest.parent.mkdir(parents=True, exist_ok=True)
    write_json(dest, kept)
    return len(kept)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 1 the source is bad, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.first_images",
        description="Keep the entries of an annotation file that are about its first images.",
        epilog="example: python -m tools.demo.first_images captions.json few.json --images 40",
    )
    parser.add_argument("source", type=Path, help="annotations (.json or .jsonl)")
    parser.add_argument("dest", type=Path, help=".json file to write; replaced if it exists")
    parser.add_argument("--images", type=int, required=True, metavar="N")
    arguments = parser.parse_args(argv)
    count = first_images(arguments.source, arguments.dest, num_images=arguments.images)
    print(f"wrote {count:,} entries to {arguments.dest}")
    return 0


if __name__ == "__main__":
    end_with(main)
