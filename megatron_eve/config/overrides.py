# SPDX-License-Identifier: Apache-2.0
"""Overrides of a recipe from the command line: `section.key=value`, strict in name and type.

    optim.peak_lr=5e-5  model.split.ffn=true  stage.trainable=patch_embedding,vision
    data.sources.0.path=/data/shards  checkpoint.load_weights_from=none  model.split=eve-v1.5

Values are written as in config.txt (values.py). A further source is added by giving all its fields under the next
number (`data.sources.1.path=... data.sources.1.proportion=...`); `data.sources=()` before them starts from none, and
`data.sources.1=none` removes one, so that later ones move up.
`model.split` also takes the name of a variant (variants.py). `model.FIELD=from_weights` takes a constant from the
weights that the run starts from, `model=from_weights` all but the split, which the stage decides. Of two overrides of
one key the later counts, as everywhere on a command line. `recipe` cannot be overridden: it says which function filled
the other fields."""

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_eve.config.model_lines import PREFIX, flat_model, model_fields
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.text_form import build, flatten
from megatron_eve.config.values import EMPTY_TUPLE, NONE, format_value, parse_value
from megatron_eve.config.variants import VARIANTS
from megatron_eve.config.weights_model import model_of_weights
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.run_files import checkpoints_of

FROM_WEIGHTS = "from_weights"
_MODEL = "model"
_SPLIT = "model.split"
_SOURCES = "data.sources"
_START = "checkpoint.load_weights_from"


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration with every `key=value` laid over it, in order. Does not check how the fields fit together.

    Raises: ConfigError for a malformed override, an unknown key (naming close ones), a value of the wrong type, or
    `from_weights` where there are no weights or they do not say what is asked of them.
    """
    flat = flatten(config)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override '{override}' is not of the form section.key=value, e.g. optim.peak_lr=5e-5."
            )
        _lay_over(flat, key=key, value=value)
    _fill_from_weights(flat)
    return build(flat)


def _lay_over(flat: dict[str, str], *, key: str, value: str) -> None:
    if key == "recipe":
        raise ConfigError(
            f"recipe={value} cannot be overridden; name another recipe instead, and set run_dir freely."
        )
    if value == FROM_WEIGHTS and key in (_MODEL, _SPLIT):
        names = [PREFIX + name for name in model_fields()]
        for name in names:
            if name.startswith(f"{_SPLIT}.") == (key == _SPLIT):
                flat[name] = FROM_WEIGHTS
    elif key == _SPLIT:
        _choose_variant(flat, name=value)
    elif key == _SOURCES and value == EMPTY_TUPLE:
        for source_key in [other for other in flat if other.startswith(f"{_SOURCES}.")]:
            del flat[source_key]
        flat[_SOURCES] = EMPTY_TUPLE
    elif value == NONE and re.fullmatch(rf"{re.escape(_SOURCES)}\.\d+", key):
        _remove_source(flat, key=key)
    else:
        if key.startswith(f"{_SOURCES}."):
            flat.pop(_SOURCES, None)
        flat[key] = value


def _remove_source(flat: dict[str, str], *, key: str) -> None:
    numbers = sorted({int(k.split(".")[2]) for k in flat if k.startswith(f"{_SOURCES}.")})
    removed = int(key.rpartition(".")[2])
    if removed not in numbers:
        raise ConfigError(
            f"{key}={NONE} removes a source that is not there; there are {len(numbers)}, numbered from 0."
        )
    for other in [k for k in flat if k.startswith(f"{_SOURCES}.")]:
        _, _, number, field = other.split(".", maxsplit=3)
        if int(number) >= removed:
            text = flat.pop(other)
            if int(number) > removed:
                flat[f"{_SOURCES}.{int(number) - 1}.{field}"] = text
    if len(numbers) == 1:
        flat[_SOURCES] = EMPTY_TUPLE


def _choose_variant(flat: dict[str, str], *, name: str) -> None:
    if name not in VARIANTS:
        raise ConfigError(f"{_SPLIT}={name} is not a variant; use one of {', '.join(VARIANTS)}, or set {_SPLIT}.norm, "
                          f"{_SPLIT}.attention and {_SPLIT}.ffn.")  # fmt: skip
    split = VARIANTS[name]
    for component in ("norm", "attention", "ffn"):
        flat[f"{_SPLIT}.{component}"] = format_value(getattr(split, component), annotation=bool)


def _fill_from_weights(flat: dict[str, str]) -> None:
    """Replace `from_weights` by the weights' own values, which config.txt then holds."""
    open_keys = [k for k, v in flat.items() if k.startswith(PREFIX) and v == FROM_WEIGHTS]
    if not open_keys:
        return
    stored = flat_model(_model_of_start(flat, asked_by=open_keys[0]))
    flat.update({key: stored[key] for key in open_keys if key in stored})


def _model_of_start(flat: dict[str, str], *, asked_by: str) -> ModelConfig:
    """The model of the run's own checkpoints, from which it resumes, else of the weights that it loads."""
    run_dir = str(parse_value(flat["run_dir"], annotation=str, key="run_dir"))
    start = parse_value(flat.get(_START, NONE), annotation=str | None, key=_START)
    path = run_dir if checkpoints_of(Path(run_dir)) else start
    if path is None:
        raise ConfigError(
            f"{asked_by}={FROM_WEIGHTS} needs {_START}, found none; name the weights or give {asked_by} a value."
        )
    try:
        model = model_of_weights(str(path))
    except CheckpointError as error:
        raise ConfigError(f"{asked_by}={FROM_WEIGHTS}: {error}") from None
    if model is None:
        raise ConfigError(
            f"{asked_by}={FROM_WEIGHTS} needs the weights {_START}={path}, which are not here; make them first or give "
            f"{asked_by} a value."
        )
    return model
