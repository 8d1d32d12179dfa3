# SPDX-License-Identifier: Apache-2.0
"""The gate between a recipe with overrides and a run: every check that needs no device, no file and no other process.

Two rounds. First each number by itself (range_checks.py), then how the fields fit together (layout_checks.py and
training_checks.py), which divide by those numbers. All problems of a round are reported at once, one per line, each
with what was found, what is expected, which field, and what to change. Source of the layout rules: megatron-core 0.16.1
and the argument checks of Megatron-LM that the wheel lacks."""

from collections.abc import Iterable

from megatron_eve.config.layout_checks import layout_problems
from megatron_eve.config.range_checks import range_problems
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.training_checks import training_problems
from megatron_eve.errors import ConfigError


def resolve(config: RunConfig) -> RunConfig:
    """The same configuration, found consistent; nothing edits it afterwards.

    Raises: ConfigError with every problem found.
    """
    _refuse(range_problems(config))
    _refuse([*layout_problems(config), *training_problems(config)])
    return config


def _refuse(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise ConfigError("\n".join(found))
