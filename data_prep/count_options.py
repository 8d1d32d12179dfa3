# SPDX-License-Identifier: Apache-2.0
"""The options of a count of tokens, and their place on the command line. Needs no torch."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from megatron_eve.config.schema import TemplateName
from megatron_eve.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CountOptions:
    """What to count. Everything but `max_unreadable`, `workers` and `again` decides the numbers."""

    shards: tuple[Path, ...]
    tokenizer: Path
    template: TemplateName
    max_text_tokens: int
    max_unreadable: float = 0.01  # as data.max_unreadable
    workers: int = 1
    again: bool = False  # read unreadable rows again

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-text-tokens", self.max_text_tokens),
            ("--workers", self.workers),
        ):
            if value < 1:
                raise ConfigError(f"{flag} {value} is below 1; give a positive number.")
        if not 0 <= self.max_unreadable < 1:
            raise ConfigError(
                f"--max-unreadable {self.max_unreadable} is no share; use a number from 0 to below 1."
            )


_TEXT_DEFAULTS = {"template": "qwen2", "max_text_tokens": 4096}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that decide a sample's text, as in the run's configuration; the tokenizer is not among them."""
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        default=_TEXT_DEFAULTS["template"],
        help="data.template of the run, or that of the source",
    )
    parser.add_argument(
        "--max-text-tokens",
        type=int,
        default=_TEXT_DEFAULTS["max_text_tokens"],
        help="data.max_text_tokens of the run",
    )


def refuse_idle_text_options(arguments: argparse.Namespace) -> None:
    """In a build that counts nothing they would change nothing. Raises: ConfigError."""
    for name, default in _TEXT_DEFAULTS.items():
        value = getattr(arguments, name)
        if arguments.tokenizer is None and value != default:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} says how tokens are counted, which is done with --tokenizer "
                "only; name the run's tokenizer, too, or leave the option out: the shards are the same."
            )


def add_count_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shards", metavar="SHARDS", type=Path, nargs="+", help="folders made by build-shards"
    )
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="data.tokenizer of the run: a folder"
    )
    add_text_options(parser)
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        help="share of the samples that may be unreadable, as data.max_unreadable",
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that count"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="read rows again that could not be read; runs that left them out cannot go on",
    )


def count_options(arguments: argparse.Namespace) -> CountOptions:
    return CountOptions(
        shards=tuple(arguments.shards),
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        max_text_tokens=arguments.max_text_tokens,
        max_unreadable=arguments.max_unreadable,
        workers=arguments.workers,
        again=arguments.again,
    )
