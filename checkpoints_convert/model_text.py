# SPDX-License-Identifier: Apache-2.0
"""The model in a checkpoint's config.txt and, if a run wrote it, the run.

A run writes its whole configuration there, the converter only the model's lines (config/model_lines.py).
"""

from collections.abc import Mapping
from typing import Any

from megatron_eve.config.model_lines import flat_model, model_from_text
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.text_form import config_from_text

from .generation import generation_lines

__all__ = ["model_from_text", "model_text", "run_from_text"]


def model_text(
    model: ModelConfig, *, origin: str, generation: Mapping[str, Any] | None = None
) -> str:
    """Sorted lines of every field of the model, the source of its weights, and how that source generates text."""
    lines = {"converted_from": origin, **flat_model(model), **generation_lines(generation or {})}
    return "".join(f"{key}: {value}\n" for key, value in sorted(lines.items()))


def run_from_text(text: str) -> RunConfig | None:
    """The run that wrote the checkpoint; None if a converter wrote it."""
    is_run = any(line.startswith("recipe: ") for line in text.splitlines())
    return config_from_text(text) if is_run else None
