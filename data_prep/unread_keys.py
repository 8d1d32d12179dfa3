# SPDX-License-Identifier: Apache-2.0
"""Which keys of a sample are read, and what would be lost with the others.

In: a sample as JSON gave it, and the paths of its images. Out: the names of unknown keys that cost nothing, to be
counted (a key of a turn as `conversations.KEY`). Refused as Rejected:

  unread_media   a key that names a medium (`video`, `images`, `Image`, `audio_path`) or whose value is one, at any
                 depth: a path that ends as a media file's, a data URL, base64 of a picture, a mark such as <video>
  unread_text    a key that says how to answer (`system_prompt`, `instruction`, `context`, `messages`)

A key that describes the sample's images (`image_width`, `image_id`), repeats a path of `image` or says where a sample
with images came from (`url`, `coco_url`, a shard's name) costs nothing, nor does a caption that is a file's name.
`ignored` are keys that the user knows to hold nothing to learn from.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from megatron_eve.data.read.media_names import (
    ARCHIVE_SUFFIXES,
    DESCRIPTIVE,
    HOLDS,
    IMAGE_MARK,
    media_kind,
    suffix_kind,
    unread_mark,
    words_of,
)

from .quarantine import Rejected

SAMPLE_KEYS = ("id", "image", "conversations", "system")
TURN_KEYS = ("from", "value")
_PROMPTS = (
    "system instruction prompt context history message dialog dialogue conversation chat tool"
)
PROMPT_WORDS = frozenset(_PROMPTS.split())
"""Words of keys whose text belongs to the conversation."""
_ORIGINS = frozenset(("url", "uri", "link", "src", "source", "href", "origin"))
_CAPTIONS = frozenset(("caption", "title", "alt", "text", "description", "desc", "label"))
_STILL = ("picture", "document")
BASE64_HEADS = {
    "/9j/": "a JPEG",
    "iVBORw0KGgo": "a PNG",
    "R0lGOD": "a GIF",
    "UklGR": "a WebP",
    "AAAAIGZ0eX": "an MP4",
    "JVBERi": "a PDF",
}
"""How the base64 of a file begins -> what it is."""
MIN_BASE64 = 64
MAX_DEPTH = 20


def unknown_keys(
    raw: Mapping[str, Any], *, paths: Sequence[str], ignored: Collection[str] = ()
) -> tuple[str, ...]:
    """Names of the keys that are not read. Raises Rejected if one of them would be missed."""
    names = []
    for key, value in _keys(raw):
        names.append(key)
        if key in ignored or value in (None, "", [], {}, False):
            continue
        found = _medium(key.rpartition(".")[2], value, paths=paths)
        if found is not None:
            raise Rejected(
                "unread_media",
                f"key `{key}` {found}; only `image` is read: put the files' paths there with an {IMAGE_MARK} mark "
                "each, or, where it holds nothing to learn from, build with --ignore-key",
            )
        if "." not in key and _is_prompt(key) and isinstance(value, str | list | dict):
            raise Rejected(
                "unread_text",
                f"key `{key}` holds {str(value)[:60]!r}, which belongs to the conversation and would be lost; put it "
                "into `conversations`, or, where it says nothing, build with --ignore-key",
            )
    return tuple(dict.fromkeys(names))


def _keys(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each key that is not read, of the sample and of its turns."""
    for key, value in raw.items():
        if key not in SAMPLE_KEYS:
            yield key, value
    turns = raw.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            for key, value in turn.items():
                if key not in TURN_KEYS:
                    yield f"conversations.{key}", value


def _is_prompt(key: str) -> bool:
    words = words_of(key)
    return any(word in PROMPT_WORDS for word in words) and not any(w in DESCRIPTIVE for w in words)


def _medium(key: str, value: Any, *, paths: Sequence[str], depth: int = 0) -> str | None:
    """The medium under a key, in words; None if there is none."""
    if depth > MAX_DEPTH:
        return "is nested too deeply to be looked through"
    if value in (None, "", [], {}, False):
        return None
    if isinstance(value, str):
        found = _medium_in_text(key, value, paths=paths)
        if found is not None:
            return found
    inner: list[tuple[str, Any]] = list(value.items()) if isinstance(value, dict) else []
    inner += [(key, entry) for entry in value] if isinstance(value, list) else []
    for name, entry in inner:
        found = _medium(name, entry, paths=paths, depth=depth + 1)
        if found is not None:
            return found
    kind = media_kind(key)
    if kind is None or _repeats(key, value, paths=paths):
        return None
    words = words_of(key)
    describes = isinstance(value, int | float) or any(word in DESCRIPTIVE for word in words)
    if paths and kind in ("picture", "video") and describes and not _holds(words, value):
        return None
    return f"names a {kind}"


def _holds(words: Sequence[str], value: Any) -> bool:
    """Whether a key such as `video_path` holds a text that no suffix gives away."""
    return any(word in HOLDS for word in words) and not isinstance(value, int | float)


def _medium_in_text(key: str, text: str, *, paths: Sequence[str]) -> str | None:
    kind = suffix_kind(text)
    if (
        kind is not None
        and not _repeats(key, text, paths=paths)
        and not _is_origin(key, text, paths=paths)
    ):
        return f"holds the path of a {kind}, {text[:80]!r}"
    embedded = embedded_file(text)
    if embedded is not None:
        return f"holds {embedded} as base64"
    mark = IMAGE_MARK if IMAGE_MARK in text else unread_mark(text, in_question=False)
    return None if mark is None else f"holds the mark {mark!r}"


def _is_origin(key: str, text: str, *, paths: Sequence[str]) -> bool:
    """Whether a file's name may be ignored: the archive of any sample; where the sample has images, the address that
    they came from, and words made from a file's name. A key that names a medium is none of these."""
    if media_kind(key) is not None:
        return False
    if text.lower().endswith(ARCHIVE_SUFFIXES):
        return True
    words = frozenset(words_of(key))
    from_address = "://" in text and bool(words & _ORIGINS) and suffix_kind(text) in _STILL
    return bool(paths) and (from_address or bool(words & _CAPTIONS))


def embedded_file(text: str) -> str | None:
    """The kind of a text that holds a file's bytes: a data URL, or base64 that begins as media files do."""
    if text.startswith("data:") and ";base64," in text[:200]:
        return f"a file ({text[5 : text.index(';')]})"
    if len(text) < MIN_BASE64:
        return None
    return next((name for head, name in BASE64_HEADS.items() if text.startswith(head)), None)


def _repeats(key: str, value: Any, *, paths: Sequence[str]) -> bool:
    """Whether a value only repeats what `image` holds: the same paths, absolute ones or addresses that end in them, or,
    under a key such as `file_name`, their last parts."""
    if isinstance(value, list):
        return bool(value) and all(_repeats(key, entry, paths=paths) for entry in value)
    if not isinstance(value, str) or not value:
        return False
    if value in paths:
        return True
    if value.startswith("/") or "://" in value:
        return any(value.endswith(f"/{path.lstrip('/')}") for path in paths)
    names_a_file = any(word in ("file", "filename", "name") for word in words_of(key))
    return names_a_file and any(path.rpartition("/")[2] == value for path in paths)
