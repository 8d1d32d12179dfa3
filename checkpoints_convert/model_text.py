# SPDX-License-Identifier: Apache-2.0
"""The model's part of a checkpoint's config.txt: `model.FIELD: value`, one per line.

A run writes its whole configuration there, the converter only the model's; both hold these lines.
"""

from typing import Any, get_type_hints

from megatron_eve.config.schema import ModelConfig, RunConfig, SplitConfig
from megatron_eve.config.text_form import config_from_text
from megatron_eve.config.values import format_value, parse_value
from megatron_eve.errors import CheckpointError

_PREFIX = "model."


def model_text(model: ModelConfig, *, origin: str) -> str:
    """Sorted lines of every field of the model, and where its weights came from."""
    lines = [f"converted_from: {origin}"]
    for name, annotation in _fields().items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(model, section) if section else model, field)
        lines.append(f"{_PREFIX}{name}: {format_value(value, annotation=annotation)}")
    return "\n".join(sorted(lines)) + "\n"


def model_from_text(text: str, *, where: str) -> ModelConfig:
    """Inverse of `model_text`, and the model of a run's configuration. `where` names the file in errors."""
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    values: dict[str, Any] = {}
    for name, annotation in _fields().items():
        key = _PREFIX + name
        if key not in lines:
            raise CheckpointError(
                f"{where} has no line '{key}: ...'; the checkpoint was written by another version or is not ours."
            )
        values[name] = parse_value(lines[key], annotation=annotation, key=f"{where}: {key}")
    split = {
        name.removeprefix("split."): values.pop(name) for name in _fields() if "split." in name
    }
    return ModelConfig(split=SplitConfig(**split), **values)


def run_from_text(text: str) -> RunConfig | None:
    """The run that wrote the checkpoint; None if a converter wrote it."""
    is_run = any(line.startswith("recipe: ") for line in text.splitlines())
    return config_from_text(text) if is_run else None


def _fields() -> dict[str, Any]:
    """`field` or `split.field` -> type."""
    fields = get_type_hints(ModelConfig)
    del fields["split"]
    return fields | {f"split.{k}": v for k, v in get_type_hints(SplitConfig).items()}
