# SPDX-License-Identifier: Apache-2.0
"""The model's lines of a checkpoint's config.txt, `model.FIELD: value`, one a field.

A run writes its whole configuration there, the converter only the model's; both hold these lines. On reading every
field must be there: a constant that is missing is unknown, and no default takes its place."""

from collections.abc import Mapping
from typing import Any, get_type_hints

from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.config.text_form import lines_of
from megatron_eve.config.values import format_value, parse_value
from megatron_eve.errors import CheckpointError

PREFIX = "model."


def flat_model(model: ModelConfig) -> dict[str, str]:
    """`model.FIELD` -> text of its value, for every field."""
    flat: dict[str, str] = {}
    for name, annotation in model_fields().items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(model, section) if section else model, field)
        flat[PREFIX + name] = format_value(value, annotation=annotation)
    return flat


def model_from_text(text: str, *, where: str) -> ModelConfig:
    """The model of a run's or a converter's configuration. `where` names the file in errors.

    Raises: CheckpointError for a field that is not there, ConfigError for a value of another type."""
    return model_of_lines(lines_of(text), where=where)


def model_of_lines(lines: Mapping[str, str], *, where: str) -> ModelConfig:
    """Like `model_from_text`, from key -> value."""
    values: dict[str, Any] = {}
    for name, annotation in model_fields().items():
        key = PREFIX + name
        if key not in lines:
            raise CheckpointError(
                f"{where} has no line '{key}: ...'; the checkpoint was written by another version or is not ours, "
                "and what its weights were trained with is not known. Write it again with the version it is of."
            )
        values[name] = parse_value(lines[key], annotation=annotation, key=f"{where}: {key}")
    split = {
        name.removeprefix("split."): values.pop(name)
        for name in model_fields()
        if name.startswith("split.")
    }
    return ModelConfig(split=SplitConfig(**split), **values)


def model_fields() -> dict[str, Any]:
    """`field` or `split.field` -> type."""
    fields = get_type_hints(ModelConfig)
    del fields["split"]
    return fields | {f"split.{k}": v for k, v in get_type_hints(SplitConfig).items()}
