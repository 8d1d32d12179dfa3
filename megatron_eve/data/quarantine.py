# SPDX-License-Identifier: Apache-2.0
"""Single samples that cannot be trained on: why, how many, and the report. A bad sample never stops
a run and is never dropped in silence: whoever finds it raises `SampleError`, whoever loops over
samples turns that into a line of quarantine.jsonl (`{"id", "source", "reason", "message"}`) and a
count.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from megatron_eve.errors import DataError

Reason = Literal[
    "image_without_mark",  # the sample has an image, no turn has the mark <image>
    "fewer_marks_than_images",
    "more_marks_than_images",
    "mark_in_answer",  # <image> in a turn of the model
    "mark_in_system",  # <image> in the system text
    "unread_mark",  # a text holds a mark of media that nobody reads: <video>, <image_1>
    "unknown_role",  # neither human nor gpt, nor system
    "turns_not_alternating",
    "unanswered_turn",  # the conversation ends with a human turn
    "no_answer",  # no turn of the model at all
    "not_two_turns",  # template plain takes one human turn and one caption
    "empty_question",  # template qwen2: a question without any text
    "empty_answer",
    "special_text",  # text that spells a token that ends or pads a text
    "cut_image",  # max_text_tokens would cut before an image
    "cut_labels",  # max_text_tokens would leave nothing to learn from
    "bad_image_size",  # no pixels
    "aspect_ratio",
    "too_many_pixels",
    "size_mismatch",  # the file's header and the shard's row disagree
    "undecodable",
    "too_long",  # more tokens than a pack holds
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class SampleError(DataError):
    """One sample cannot be used. `reason` is the code that reports and counters group by."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One line of quarantine.jsonl."""

    id: str
    source: str
    reason: Reason
    message: str


def append_report(path: Path, entries: Iterable[Quarantined]) -> None:
    """Append entries to a quarantine.jsonl with one write, so that several processes may share the
    file."""
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, lines.encode("utf-8"))
    finally:
        os.close(descriptor)
