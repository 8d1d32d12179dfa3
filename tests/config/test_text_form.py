# SPDX-License-Identifier: Apache-2.0
"""config_text and config_from_text are exact inverses, also for values that look like something else."""

import re
from dataclasses import replace

import pytest

from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.schema import RunConfig, ShardSource
from megatron_eve.config.text_form import config_from_text, config_text
from megatron_eve.errors import ConfigError

CONFIG = load_recipe("eve_tiny_stage3")
TEXT = config_text(CONFIG)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_the_round_trip(name: str) -> None:
    config = load_recipe(name)
    assert config_from_text(config_text(config)) == config


def test_text_is_sorted_with_one_field_a_line() -> None:
    lines = TEXT.splitlines()
    keys = [line.split(": ", 1)[0] for line in lines]
    assert keys == sorted(set(keys))
    assert "optim.peak_lr: 0.0005" in lines
    assert "stage.trainable: patch_embedding,vision,text" in lines
    assert "train.epochs: none" in lines
    assert "data.sources.0.path: data/demo/questions/shards" in lines


@pytest.mark.parametrize(
    "path", ["", "none", '"', '"a"', " a", "a ", "a\nb", "a: b", "a=b", "()", "1", "a\u2028b", "Ünïcode/路", "a,b"]
)  # fmt: skip
def test_awkward_strings_survive(path: str) -> None:
    config = replace(
        CONFIG,
        run_dir=path,
        data=replace(CONFIG.data, sources=(ShardSource(path=path, proportion=0.1 + 0.2),)),
        checkpoint=replace(CONFIG.checkpoint, load_weights_from=path),
    )
    assert config_from_text(config_text(config)) == config


def test_empty_tuples_and_many_sources_survive() -> None:
    many = tuple(ShardSource(path=str(i), proportion=float(i + 1)) for i in range(12))
    for sources in ((), many):
        config: RunConfig = replace(
            CONFIG,
            data=replace(CONFIG.data, sources=sources),
            stage=replace(CONFIG.stage, trainable=()),
        )
        assert config_from_text(config_text(config)) == config


def test_source_without_a_template_takes_the_stages() -> None:
    """Also in the text of a run that was written before sources had templates of their own."""
    without = "".join(
        line
        for line in TEXT.splitlines(keepends=True)
        if not re.match(r"data\.sources\.\d+\.template:", line)
    )
    assert without != TEXT
    sources = config_from_text(without).data.sources
    assert sources and all(source.template is None for source in sources)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT + "model.depth: 3\n", "model.depth is not a field of the configuration"),
        (TEXT.replace("train.seed: 42\n", ""), "train.seed is missing from the configuration"),
        (TEXT + "train.seed: 43\n", "repeats train.seed; keep one of the two"),
        (TEXT + "train.seed=43\n", "is 'train.seed=43'; expected 'key: value'"),
        (TEXT.replace("train.seed: 42", "train.seed: x"), "train.seed=x is not an integer"),
    ],
)
def test_broken_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_text(text)
