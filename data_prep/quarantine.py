# SPDX-License-Identifier: Apache-2.0
"""Why a sample does not become a row, as data: `Rejected` is raised where the fault is found, and becomes one line of
quarantine.jsonl. Every reason has its meaning here; docs and dataset.json use the same words, and faults that the
trainer can find as well have the same name there (megatron_eve/data/read/quarantine.py)."""

from dataclasses import asdict, dataclass

REASONS: dict[str, str] = {
    "missing_json": "the file that the index names does not exist",
    "bad_json": "the line or file is not valid JSON",
    "duplicate_key": "an object of the line or file has a key twice",
    "not_a_sample": "the entry is not a JSON object",
    "bad_id": "`id` is neither a text nor a number",
    "path_outside_folder": "the path leads out of its folder",
    "bad_image_field": "`image` is neither a path of a picture nor a list of such paths",
    "unread_media": "a key that is not read names media or holds it",
    "unread_text": "a key that is not read holds a part of the conversation",
    "no_conversations": "`conversations` is absent, empty or not a list",
    "bad_turn": "a turn is not an object with the texts `from` and `value`",
    "unknown_role": "a turn is from somebody else than human, gpt or system",
    "two_system_texts": "the key `system` and the system turn say different things",
    "turns_not_alternating": "the turns do not alternate human, gpt, human, gpt, ...",
    "unanswered_turn": "the conversation ends with a human turn",
    "no_answer": "there is no answer to a human turn",
    "empty_question": "a question has no text at all (template plain does not use it, qwen2 does)",
    "empty_answer": "an answer has no text at all, or none has any",
    "special_text": "a text contains a token that ends or pads a text",
    "invalid_unicode": "the id or a text contains half of a surrogate pair, which UTF-8 cannot store",
    "image_without_mark": "there is an image but no <image> mark in the conversation",
    "fewer_marks_than_images": "some images have no <image> mark",
    "more_marks_than_images": "some <image> marks have no image",
    "mark_in_answer": "an answer contains the <image> mark",
    "mark_in_system": "the system text contains the <image> mark",
    "unread_mark": "a text contains a mark of media that is not read (<video>, <image_1>)",
    "missing_image": "the image file does not exist",
    "empty_image": "the image file has no bytes",
    "unreadable_image": "the bytes are not an image of a supported format",
    "truncated_image": "the image ends before its last row",
    "corrupt_image": "the image's compressed data is damaged",
    "unsupported_pixels": "the pixel format has no unambiguous 8-bit RGB form",
    "too_many_pixels": "the image has more pixels than the limit (decompression bomb)",
    "aspect_ratio": "the image is far longer in one direction than in the other",
}
"""Reason -> meaning."""


class Rejected(Exception):
    """A sample must not become a row. `reason` is a key of REASONS; `file` is the image or JSON file at fault."""

    def __init__(self, reason: str, message: str, *, file: str | None = None) -> None:
        assert reason in REASONS, reason
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.file = file


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineRecord:
    """One line of quarantine.jsonl."""

    index: int  # position in the input, from 0
    id: str
    file: str | None
    reason: str
    message: str

    def as_json(self) -> dict[str, object]:
        return asdict(self)
