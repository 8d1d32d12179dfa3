# SPDX-License-Identifier: Apache-2.0
"""From one entry of an annotation file to a `Sample`: check the conversation, read and check its images.

In: a `RawEntry` and the folders its paths are relative to. Out: the sample and what was changed on the way (counted,
never silent). Everything that training could not use raises Rejected with its reason; a fault of the file system
(permission, I/O error) is nobody's sample and stops the build instead.

Sources: the sample format is EVE's and LLaVA's. A conversation may start with an answer, which the trainer leaves out
as EVE's preprocess_eve does (train.py:196-198); what the official code would mask, print or assert is refused.
"""

import errno
import json
import posixpath
from dataclasses import dataclass
from pathlib import Path

from data_prep.images import ImageLimits, check_image
from data_prep.quarantine import QuarantineRecord, Rejected
from data_prep.readers import RawEntry
from data_prep.tokenizer import CONTROL_TOKENS
from megatron_eve.data.media_names import IMAGE_MARK
from megatron_eve.data.sample import Sample, Turn
from megatron_eve.errors import DataError

ROLES = ("human", "gpt")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleContext:
    """What all samples of a build share."""

    image_folder: Path
    json_folder: Path  # where the paths of an index of JSON files start
    source: str
    limits: ImageLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSample:
    """A sample ready to be stored, and the names of the changes made to it."""

    sample: Sample
    changes: tuple[str, ...]


def check_entry(entry: RawEntry, *, context: SampleContext) -> CheckedSample | QuarantineRecord:
    """The sample in `entry`, or the record of why there is none. Raises DataError when files cannot be accessed."""
    sample_id = f"{context.source}-{entry.index}"
    try:
        raw = _load(entry, context=context)
        sample_id = _sample_id(raw, default=sample_id)
        turns = _turns(raw)
        paths = _image_paths(raw)
        _check_marks(turns, num_images=len(paths))
        images = []
        for path in paths:
            try:
                images.append(
                    check_image(_read(path, folder=context.image_folder), limits=context.limits)
                )
            except Rejected as rejected:
                rejected.file = path
                raise
    except Rejected as rejected:
        return QuarantineRecord(
            index=entry.index,
            id=_printable(sample_id),
            file=None if rejected.file is None else _printable(rejected.file),
            reason=rejected.reason,
            message=_printable(rejected.message),
        )
    sample = Sample(
        id=sample_id,
        images=tuple(image.data for image in images),
        image_sizes=tuple((image.height, image.width) for image in images),
        turns=turns,
        source=context.source,
    )
    changes = tuple(image.change for image in images if image.change is not None)
    return CheckedSample(sample=sample, changes=changes)


def _load(entry: RawEntry, *, context: SampleContext) -> dict[str, object]:
    """The entry as an object, read from its own file if the input is an index."""
    value = entry.value
    if entry.error is not None:
        raise Rejected("bad_json", entry.error)
    if isinstance(value, str):
        try:
            value = json.loads(_read(value, folder=context.json_folder, missing="missing_json"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Rejected("bad_json", str(error), file=str(entry.value)) from error
    if not isinstance(value, dict):
        raise Rejected("not_a_sample", f"expected a JSON object, found {type(value).__name__}")
    return value


def _read(path: str, *, folder: Path, missing: str = "missing_image") -> bytes:
    """Bytes of folder/path; a path that leaves the folder is refused (links inside the folder may point anywhere)."""
    if posixpath.isabs(path) or posixpath.normpath(path).split("/")[0] == "..":
        raise Rejected("path_outside_folder", f"{path} leaves {folder}", file=path)
    try:
        return (folder / path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise Rejected(missing, f"no file {path} in {folder}", file=path) from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise Rejected(missing, f"no file {path[:80]}… in {folder}", file=path) from error
        raise DataError(
            f"cannot read {folder / path}: {error}; repair access and run the same command again, "
            "finished parts are kept."
        ) from error


def _sample_id(raw: dict[str, object], *, default: str) -> str:
    value = raw.get("id")
    sample_id = default if value is None or value == "" else str(value)
    _check_unicode(sample_id)
    return sample_id


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("invalid_unicode", f"{error.reason} at character {error.start}") from error


def _turns(raw: dict[str, object]) -> tuple[Turn, ...]:
    """All turns of the conversation, checked."""
    conversation = raw.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise Rejected("no_conversations", f"`conversations` is {str(conversation)[:80]!r}")
    turns = tuple(_turn(value, number=number) for number, value in enumerate(conversation))
    _check_order([turn.role for turn in turns])
    for number, turn in enumerate(turns):
        _check_text(turn, number=number)
    return turns


def _check_order(roles: list[str]) -> None:
    """Human and gpt in turn, ending with gpt; one leading answer is allowed."""
    found = f"roles {' '.join(roles)}"[:200]
    counted = roles[1:] if roles[0] == "gpt" else roles
    if "gpt" not in counted:
        raise Rejected("no_answer", found)
    if counted != [ROLES[i % 2] for i in range(len(counted))]:
        raise Rejected("turns_not_alternating", found)
    if counted[-1] != "gpt":
        raise Rejected("unanswered_turn", found)


def _turn(value: object, *, number: int) -> Turn:
    role, text = (
        (value.get("from"), value.get("value")) if isinstance(value, dict) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(text, str):
        raise Rejected("bad_turn", f"turn {number} is {str(value)[:80]!r}")
    if role not in ROLES:
        raise Rejected("unknown_role", f"turn {number} is from {role[:40]!r}, known are {ROLES}")
    return Turn(role=role, text=text)


def _check_text(turn: Turn, *, number: int) -> None:
    _check_unicode(turn.text)
    for token in CONTROL_TOKENS:
        if token in turn.text:
            raise Rejected("special_text", f"turn {number} contains {token}")
    if turn.role == "gpt":
        if not turn.text.strip():
            raise Rejected("empty_answer", f"turn {number} has no text")
        if IMAGE_MARK in turn.text:
            raise Rejected("mark_in_answer", f"turn {number} contains {IMAGE_MARK}")


def _image_paths(raw: dict[str, object]) -> tuple[str, ...]:
    """`image`: absent or null (text only), one path, or a list of paths."""
    value = raw.get("image")
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise Rejected("bad_image_field", f"`image` is {str(value)[:80]!r}")
    return tuple(paths)


def _check_marks(turns: tuple[Turn, ...], *, num_images: int) -> None:
    """As many <image> marks as images."""
    num_marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if num_marks == num_images:
        return
    found = f"{num_images} images, {num_marks} {IMAGE_MARK} marks"
    if num_marks == 0:
        raise Rejected("image_without_mark", found)
    more = num_marks > num_images
    raise Rejected("more_marks_than_images" if more else "fewer_marks_than_images", found)


def _printable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates become question marks."""
    return text.encode(errors="replace").decode()
