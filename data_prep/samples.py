# SPDX-License-Identifier: Apache-2.0
"""From one entry of an annotation file to a `Sample`: check the conversation, read and check its images.

In: a `RawEntry` and the folders its paths are relative to. Out: the sample and what was changed on the way (counted,
never silent). Everything that training could not use raises Rejected with its reason; a fault of the file system
(permission, I/O error) is no sample's fault and stops the build.

Sources: the sample format is EVE's and LLaVA's. A conversation may start with a system turn (or the sample has a key
`system`) and with an answer, which the trainer leaves out as EVE's preprocess_eve does (train.py:196-198). For build
and training alike megatron_eve/data/read/text_rules.py decides which conversations can be trained on.
"""

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.media_names import suffix_kind
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.text_rules import ROLES, SYSTEM, templates_that_train
from megatron_eve.data.sample import Sample, Turn
from megatron_eve.errors import DataError

from .images import ImageLimits, check_image
from .inside import file_inside
from .quarantine import QuarantineRecord, Rejected
from .readers import DuplicateKeyError, RawEntry, parse_json
from .unread_keys import embedded_file, unknown_keys

OTHER_ROLES = {"user": "human", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt"}
"""How other formats call the two sides."""
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleContext:
    """What all samples of a build share."""

    image_folder: Path
    json_folder: Path  # where the paths of an index of JSON files start
    source: str
    limits: ImageLimits
    ignored_keys: tuple[str, ...] = ()  # unknown keys that hold nothing to learn from


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSample:
    """A sample ready to be stored, and the facts to count about it."""

    sample: Sample
    changes: tuple[str, ...]  # what was changed in its images
    unknown_keys: tuple[str, ...]  # unread keys
    templates: tuple[TemplateName, ...]  # those that can train it


def check_entry(entry: RawEntry, *, context: SampleContext) -> CheckedSample | QuarantineRecord:
    """The sample in `entry`, or the record of why there is none. Raises DataError when files cannot be accessed."""
    sample_id = f"{context.source}-{entry.index}"
    try:
        raw = _load(entry, context=context)
        sample_id = _sample_id(raw, default=sample_id)
        paths = _image_paths(raw)
        unknown = unknown_keys(raw, paths=paths, ignored=context.ignored_keys)
        turns = _turns(raw)
        templates = _templates(turns, num_images=len(paths))
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
    return CheckedSample(sample=sample, changes=changes, unknown_keys=unknown, templates=templates)


def _load(entry: RawEntry, *, context: SampleContext) -> dict[str, object]:
    """The entry as an object, read from its own file if the input is an index."""
    value = entry.value
    if entry.error is not None:
        raise Rejected("duplicate_key" if entry.is_duplicate else "bad_json", entry.error)
    if isinstance(value, str):
        try:
            text = _read(value, folder=context.json_folder, missing="missing_json")
            value = parse_json(text.decode("utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Rejected("bad_json", str(error), file=str(entry.value)) from error
        except DuplicateKeyError as error:
            raise Rejected("duplicate_key", str(error), file=str(entry.value)) from error
    if not isinstance(value, dict):
        raise Rejected("not_a_sample", f"expected a JSON object, found {type(value).__name__}")
    return value


def _read(path: str, *, folder: Path, missing: str = "missing_image") -> bytes:
    """Bytes of a file in `folder`; a path that leads out of it is refused."""
    try:
        file = file_inside(path, folder=folder)
        if file is None:
            raise Rejected(
                "path_outside_folder",
                f"{path} is outside {folder}; give a folder that holds it, or link it there",
                file=path,
            )
        return file.read_bytes()
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
    if not isinstance(value, str | int | float | None):
        raise Rejected("bad_id", f"`id` is {str(value)[:80]!r}, expected a text or a number")
    sample_id = default if value is None or value == "" else str(value)
    _check_unicode(sample_id)
    return sample_id


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected("invalid_unicode", f"{error.reason} at character {error.start}") from error


def _turns(raw: Mapping[str, object]) -> tuple[Turn, ...]:
    """All turns of the conversation; a system text in front, from the sample's key or the first turn."""
    conversation = raw.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise Rejected("no_conversations", _found_instead(raw))
    turns = tuple(_turn(value, number=number) for number, value in enumerate(conversation))
    system = raw.get("system")
    if system is not None and not isinstance(system, str):
        raise Rejected("bad_turn", f"`system` is {str(system)[:80]!r}, expected a text")
    if turns[0].role == SYSTEM and not turns[0].text.strip():
        turns = turns[1:]
    if system and system.strip():
        if turns and turns[0].role == SYSTEM and turns[0].text.strip() != system.strip():
            raise Rejected(
                "two_system_texts",
                f"`system` is {system[:40]!r}, the first turn says {turns[0].text[:40]!r}",
            )
        _check_unicode(system)
        turns = (Turn(role=SYSTEM, text=system), *(turn for turn in turns if turn.role != SYSTEM))
    return turns


def _found_instead(raw: Mapping[str, object]) -> str:
    """What stands in place of a conversation."""
    value = raw.get("conversations")
    if "conversations" in raw:
        return f"`conversations` is {str(value)[:80]!r}, expected a list of turns"
    keys = ", ".join(f"`{key}`" for key in list(raw)[:12]) or "none"
    return (
        f"there is no key `conversations`, found {keys}; write a question and its answer as "
        '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
    )


def _turn(value: object, *, number: int) -> Turn:
    role, text = (
        (value.get("from"), value.get("value")) if isinstance(value, dict) else (None, None)
    )
    if not isinstance(role, str) or not isinstance(text, str):
        raise Rejected(
            "bad_turn", f"turn {number} is {str(value)[:80]!r}, expected texts `from` and `value`"
        )
    if role not in ROLES:
        meant = OTHER_ROLES.get(role.strip().lower(), role.strip().lower())
        advice = f": write {meant!r}" if meant in ROLES else ""
        raise Rejected(
            "unknown_role",
            f"turn {number} is from {role[:40]!r}, known are {', '.join(ROLES)}{advice}",
        )
    _check_unicode(text)
    return Turn(role=role, text=text)


def _templates(turns: tuple[Turn, ...], *, num_images: int) -> tuple[TemplateName, ...]:
    try:
        return templates_that_train(turns, num_images=num_images)
    except SampleError as error:
        raise Rejected(error.reason, error.message) from error


def _image_paths(raw: Mapping[str, object]) -> tuple[str, ...]:
    """`image`: absent, null or empty (text only), one path, or a list of paths."""
    value = raw.get("image")
    paths = [] if value is None or value == "" else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise Rejected(
            "bad_image_field",
            f"`image` is {str(value)[:80]!r}, expected the path of a file or a list of them",
        )
    for path in paths:
        if (embedded := embedded_file(path)) is not None:
            raise Rejected(
                "bad_image_field",
                f"`image` holds {embedded} as base64, {path[:24]!r}…; write the pictures to files",
            )
        if _ADDRESS.match(path):
            advice = "write the path alone" if path.startswith("file:") else "download the pictures"
            raise Rejected("bad_image_field", f"`image` is the address {path[:200]!r}; {advice}")
        kind = suffix_kind(path)
        if kind not in (None, "picture"):
            raise Rejected("bad_image_field", f"`image` names a {kind}, {path[:200]!r}")
    return tuple(paths)


def _printable(text: str) -> str:
    """Text that can be written as UTF-8: lone surrogates become question marks."""
    return text.encode(errors="replace").decode()
