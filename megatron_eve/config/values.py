# SPDX-License-Identifier: Apache-2.0
"""One configuration value as text and back: the right side of `=` in an override and of `: ` in config.txt.

Written forms: `true`/`false`, `none`, integers, floats (shortest text that reads back to the same bits), names of a
Literal, tuples of names joined by commas (`()` when empty), strings as they are. A string that would read back as
something else (empty, `none` where a field may be none, with a quote in front, white space at an end or a control
character) is written as a JSON string."""

import json
import math
import types
from collections.abc import Sequence
from typing import Literal, Union, get_args, get_origin

from megatron_eve.errors import ConfigError

NONE = "none"
EMPTY_TUPLE = "()"


def format_value(value: object, *, annotation: object) -> str:
    """Text of a scalar or of a tuple of names; `parse_value` reads exactly this value back."""
    if _is_optional(annotation) and value == NONE:
        return json.dumps(value)
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value) or EMPTY_TUPLE
    if isinstance(value, str) and get_origin(annotation) is not Literal:
        return json.dumps(value) if _needs_quotes(value) else value
    return value if isinstance(value, str) else repr(value)


def parse_value(text: str, *, annotation: object, key: str) -> object:
    """The value that `text` stands for under the type of the dataclass field `key`.

    Raises: ConfigError with the text found and the type expected.
    """
    try:
        return _parse(text, annotation)
    except ValueError:
        raise ConfigError(f"{key}={text} is not {describe(annotation)}.") from None


def describe(annotation: object) -> str:
    """The type of a field in words, with the allowed values where they are few."""
    if _is_optional(annotation):
        return f"{describe(_without_none(annotation))}, or {NONE}"
    if get_origin(annotation) is Literal:
        return _one_of([str(choice) for choice in get_args(annotation)])
    if get_origin(annotation) is tuple:
        return f"a list joined by commas, each {describe(get_args(annotation)[0])}"
    words = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
    return next(word for kind, word in words.items() if annotation is kind)


def _parse(text: str, annotation: object) -> object:
    if _is_optional(annotation):
        return None if text == NONE else _parse(text, _without_none(annotation))
    if get_origin(annotation) is Literal:
        return _choice(text, get_args(annotation))
    if get_origin(annotation) is tuple:
        items = [] if text == EMPTY_TUPLE else text.split(",")
        return tuple(_parse(item.strip(), get_args(annotation)[0]) for item in items)
    if annotation is bool:
        return _choice(text, ("true", "false")) == "true"
    if annotation is int:
        return int(text)
    if annotation is float:
        return _finite(float(text))
    if annotation is str:
        return _string(text)
    raise TypeError(f"no text form for a field of type {annotation}")


def _choice(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ValueError(text)
    return text


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(number)
    return number


def _string(text: str) -> str:
    value = json.loads(text) if text.startswith('"') else text
    if not isinstance(value, str):
        raise ValueError(text)
    return value


def _needs_quotes(value: str) -> bool:
    return value == "" or value[0] == '"' or value != value.strip() or not value.isprintable()


def _is_optional(annotation: object) -> bool:
    return get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)


def _without_none(annotation: object) -> object:
    (kind,) = [argument for argument in get_args(annotation) if argument is not type(None)]
    return kind


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
