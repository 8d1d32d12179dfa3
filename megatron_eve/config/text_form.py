# SPDX-License-Identifier: Apache-2.0
"""A whole configuration as text and back: `config.txt` of a run and of each checkpoint, and the flat key -> text form
that overrides are laid over.

`config_text` writes every field, sorted, one `key: value` per line; `config_from_text` is its exact inverse and refuses
unknown, missing, repeated and ill-typed keys; only a field with a default may be missing. Neither checks how fields fit
together; resolve() does."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.values import EMPTY_TUPLE, format_value, parse_value
from megatron_eve.errors import ConfigError


def config_text(config: RunConfig) -> str:
    """Every field of the configuration, sorted, one `key: value` per line."""
    return "".join(f"{key}: {text}\n" for key, text in sorted(flatten(config).items()))


def config_from_text(text: str) -> RunConfig:
    """The configuration that `config_text` wrote.

    Raises: ConfigError naming the line or key that is malformed, repeated, unknown, missing or of a wrong type.
    """
    flat: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        key, separator, value = line.partition(": ")
        if not line.strip():
            continue
        if not separator:
            raise ConfigError(
                f"line {number} of the configuration is '{line}'; expected 'key: value'."
            )
        if key in flat:
            raise ConfigError(
                f"line {number} of the configuration repeats {key}; keep one of the two."
            )
        flat[key] = value
    return build(flat)


def lines_of(text: str) -> dict[str, str]:
    """Key -> value of a config.txt, whatever else it holds and whichever version wrote it."""
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def flatten(config: RunConfig) -> dict[str, str]:
    """Dotted key -> text of every field; items of a tuple of sections are numbered: `data.sources.0.path`."""
    return dict(_flatten(config, prefix=""))


def build(flat: Mapping[str, str]) -> RunConfig:
    """The configuration that the flat form describes: every field typed, those without a default present, nothing left
    over.

    Raises: ConfigError for an unknown, missing or ill-typed key.
    """
    known = _known_keys(RunConfig, prefix="", flat=flat)
    for key in flat:
        if key not in known:
            raise ConfigError(_unknown_key(key, known))
    config = _build(RunConfig, prefix="", flat=flat)
    assert isinstance(config, RunConfig)
    return config


def _flatten(section: Any, *, prefix: str) -> Iterable[tuple[str, str]]:
    for name, annotation in get_type_hints(type(section)).items():
        key, value = prefix + name, getattr(section, name)
        if is_dataclass(annotation):
            yield from _flatten(value, prefix=f"{key}.")
        elif _item_section(annotation) is not None and value:
            for index, item in enumerate(value):
                yield from _flatten(item, prefix=f"{key}.{index}.")
        else:
            yield key, format_value(value, annotation=annotation)


def _build(section: type, *, prefix: str, flat: Mapping[str, str]) -> object:
    values: dict[str, object] = {}
    defaults = {f.name: f.default for f in fields(section) if f.default is not MISSING}
    for name, annotation in get_type_hints(section).items():
        key = prefix + name
        item_section = _item_section(annotation)
        if isinstance(annotation, type) and is_dataclass(annotation):
            values[name] = _build(annotation, prefix=f"{key}.", flat=flat)
        elif item_section is not None:
            indices = range(_num_items(key, flat))
            values[name] = tuple(
                _build(item_section, prefix=f"{key}.{i}.", flat=flat) for i in indices
            )
        elif key in flat:
            values[name] = parse_value(flat[key], annotation=annotation, key=key)
        elif name in defaults:
            values[name] = defaults[name]
        else:
            raise ConfigError(f"{key} is missing from the configuration; add it with a value.")
    return section(**values)


def _known_keys(section: type, *, prefix: str, flat: Mapping[str, str]) -> list[str]:
    keys: list[str] = []
    for name, annotation in get_type_hints(section).items():
        key = prefix + name
        item_section = _item_section(annotation)
        if isinstance(annotation, type) and is_dataclass(annotation):
            keys += _known_keys(annotation, prefix=f"{key}.", flat=flat)
        elif item_section is not None:
            num_items = _num_items(key, flat)
            for index in range(num_items):
                keys += _known_keys(item_section, prefix=f"{key}.{index}.", flat=flat)
            keys += [] if num_items or flat.get(key) != EMPTY_TUPLE else [key]
        else:
            keys.append(key)
    return keys


def _num_items(key: str, flat: Mapping[str, str]) -> int:
    """Items of a tuple of sections: its keys must be numbered 0, 1, 2 ... without a gap."""
    numbers = {other[len(key) + 1 :].split(".")[0] for other in flat if other.startswith(f"{key}.")}
    expected = {str(index) for index in range(len(numbers))}
    if numbers != expected:
        wrong = sorted(numbers - expected)[0]
        raise ConfigError(
            f"{key}.{wrong} does not continue the numbering; use {key}.0 to {key}.{len(numbers) - 1}, without a gap."
        )
    return len(numbers)


def _item_section(annotation: object) -> type | None:
    """The dataclass of which a field holds a tuple, if it does."""
    if (
        get_origin(annotation) is tuple
        and isinstance(item := get_args(annotation)[0], type)
        and is_dataclass(item)
    ):
        return item
    return None


def _unknown_key(key: str, known: list[str]) -> str:
    inside = [other for other in known if other.startswith(f"{key}.")]
    if inside:
        return (
            f"{key} is a section of the configuration; set one of its fields: {', '.join(inside)}."
        )
    close = [other for other in known if other.endswith(f".{key}")]
    close += [other for other in difflib.get_close_matches(key, known, n=3) if other not in close]
    sections = ", ".join(field.name for field in fields(RunConfig))
    hint = f"did you mean {' or '.join(close)}?" if close else f"the top level holds {sections}."
    return f"{key} is not a field of the configuration; {hint}"
