# SPDX-License-Identifier: Apache-2.0
"""Overrides of a recipe from the command line: `section.key=value`, strict in name and type.

    optim.peak_lr=5e-5  model.split.ffn=true  stage.trainable=patch_embedding,vision
    data.sources.0.path=/data/shards  checkpoint.load_weights_from=none  model.split=eve-v1.5

Values are written as in config.txt (values.py). A further source is added by giving all its fields under the next
number (`data.sources.1.path=... data.sources.1.proportion=...`); `data.sources=()` before them starts from none.
`model.split` also takes the name of a variant (variants.py). Of two overrides of one key the later counts, as
everywhere on a command line. `recipe` cannot be overridden: it says which function filled the other fields."""

from collections.abc import Iterable

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import build, flatten
from megatron_eve.config.values import EMPTY_TUPLE, format_value
from megatron_eve.config.variants import VARIANTS
from megatron_eve.errors import ConfigError

_SPLIT = "model.split"
_SOURCES = "data.sources"


def apply_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """The configuration with every `key=value` laid over it, in order. Does not check how the fields fit together.

    Raises: ConfigError for a malformed override, an unknown key (naming close ones) or a value of the wrong type.
    """
    flat = flatten(config)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(
                f"override '{override}' is not of the form section.key=value, e.g. optim.peak_lr=5e-5."
            )
        _lay_over(flat, key=key, value=value)
    return build(flat)


def _lay_over(flat: dict[str, str], *, key: str, value: str) -> None:
    if key == "recipe":
        raise ConfigError(
            f"recipe={value} cannot be overridden; name another recipe instead, and set run_dir freely."
        )
    if key == _SPLIT:
        _choose_variant(flat, name=value)
    elif key == _SOURCES and value == EMPTY_TUPLE:
        for source_key in [other for other in flat if other.startswith(f"{_SOURCES}.")]:
            del flat[source_key]
        flat[_SOURCES] = EMPTY_TUPLE
    else:
        if key.startswith(f"{_SOURCES}."):
            flat.pop(_SOURCES, None)
        flat[key] = value


def _choose_variant(flat: dict[str, str], *, name: str) -> None:
    if name not in VARIANTS:
        raise ConfigError(f"{_SPLIT}={name} is not a variant; use one of {', '.join(VARIANTS)}, or set {_SPLIT}.norm, "
                          f"{_SPLIT}.attention and {_SPLIT}.ffn.")  # fmt: skip
    split = VARIANTS[name]
    for component in ("norm", "attention", "ffn"):
        flat[f"{_SPLIT}.{component}"] = format_value(getattr(split, component), annotation=bool)
