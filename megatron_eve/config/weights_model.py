# SPDX-License-Identifier: Apache-2.0
"""The model comes from one place: the model in a folder of weights is compared with the one that a run would build.

Weights computed with one rotary base, norm epsilon or number of heads and used with another are another model, and
their tensors have the same shapes. So every constant in the weights' config.txt is compared with the run's before
anything is built, in a dry run too; `model.FIELD=from_weights` and `model=from_weights` take it from there instead.
Reads config.txt alone: no torch."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.config.model_lines import PREFIX, flat_model, model_fields, model_from_text
from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.run_files import COMPLETE, CONFIG, newest_first

FREE = {"init_std"}
"""Constants that may differ: they decide how random weights are drawn, and change nothing in loaded ones."""

_COPY = "checkpoint.copy_text_to_vision"


def model_of_weights(path: str | Path) -> ModelConfig | None:
    """The model of a checkpoint, of a converter's folder or of the newest checkpoint in a run directory; None if
    there is nothing at `path`.

    Raises: CheckpointError if what is there is no checkpoint or does not say all of its model."""
    path = Path(path)
    if not path.exists():
        return None
    where = config_of_weights(path)
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{where} cannot be read ({error}); without it the constants of the weights' model are not known. Use "
            "another checkpoint."
        ) from error
    return model_from_text(text, where=str(where))


def config_of_weights(path: Path) -> Path:
    """config.txt of the checkpoint that `path` means; all checkpoints of a run have one model.

    Raises: CheckpointError if there is no whole checkpoint."""
    for folder in [*newest_first(path), path]:
        if (folder / COMPLETE).is_file():
            return folder / CONFIG
    raise CheckpointError(
        f"{path} is neither a checkpoint nor a run directory with one ({COMPLETE} not found); name a run, a "
        "checkpoint, or what `megatron-eve convert hf-to-megatron` wrote."
    )


def fact_of_weights(path: str | Path, name: str) -> Any:
    """The entry `name` in complete.json of the checkpoint that `path` means; None if there is none."""
    try:
        folder = config_of_weights(Path(path)).parent
        return json.loads((folder / COMPLETE).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None  # the load, which compares every byte, says what is wrong with it


def refuse_other_model(
    model: ModelConfig, stored: ModelConfig, *, weights: str | Path, copy_text_to_vision: bool
) -> None:
    """Raises: ConfigError with a line for each constant in which the models of run and weights differ."""
    lines = list(
        differences(model, stored, weights=weights, copy_text_to_vision=copy_text_to_vision)
    )
    if lines:
        raise ConfigError("\n".join(lines))


def differences(
    model: ModelConfig, stored: ModelConfig, *, weights: str | Path, copy_text_to_vision: bool
) -> Iterator[str]:
    """One line a field: both values, and what to change."""
    for name, (here, there) in differing_constants(model, stored).items():
        key = PREFIX + name
        yield (
            f"{key}={here}, but the weights of {weights} have {there}; set {key}={there} or {key}=from_weights, or "
            f"load other weights{_HINTS.get(name, '')}."
        )
    yield from _split_differences(
        model, stored, weights=weights, copy_text_to_vision=copy_text_to_vision
    )


def differing_constants(model: ModelConfig, other: ModelConfig) -> dict[str, tuple[str, str]]:
    """Field -> both values as text, of every constant but the split and those that may differ."""
    here, there = flat_model(model), flat_model(other)
    return {
        name: (here[PREFIX + name], there[PREFIX + name])
        for name, annotation in model_fields().items()
        if name not in FREE
        and not name.startswith("split.")
        and not _same(here[PREFIX + name], there[PREFIX + name], is_float=annotation is float)
    }


_HINTS = {
    "vocab_size": " (`hf-to-megatron --vocab-size` converts to another number of rows)",
    "patch_embed_dim": " (`hf-to-megatron --patch-embed-dim` makes another new patch embedding)",
}


def _same(here: str, there: str, *, is_float: bool) -> bool:
    """Floats are the same if they are one number in fp32, in which they are used: 1e-5 is 9.999999747378752e-06."""
    if not is_float:
        return here == there
    return struct.pack("f", float(here)) == struct.pack("f", float(there))


def _split_differences(
    model: ModelConfig, stored: ModelConfig, *, weights: str | Path, copy_text_to_vision: bool
) -> Iterator[str]:
    """A component that only the run splits can start as a copy; one that only the weights split cannot be joined."""
    for part in ("norm", "attention", "ffn"):
        here, there = getattr(model.split, part), getattr(stored.split, part)
        key = f"model.split.{part}"
        if there and not here:
            yield (
                f"{key}=false, but the weights of {weights} have true, vision weights of their own; set {key}=true or "
                "load weights that are not split."
            )
        elif here and not there and not copy_text_to_vision:
            yield (
                f"{key}=true, but the weights of {weights} have false, no vision weights; set {_COPY}=true to start "
                f"them as copies of the text weights, or {key}=false."
            )
