# SPDX-License-Identifier: Apache-2.0
"""Recipes against the paper's numbers, against each other, and against golden files.

A golden file is the recipe's resolved text; a changed default shows up in review as a changed line. After an intended
change: `UPDATE_GOLDEN=1 python -m pytest tests/config/test_recipes.py`, then read the diff."""

import itertools
import os
from pathlib import Path

import pytest

from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.resolve import resolve
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_resolves_to_its_golden_text(name: str) -> None:
    text = config_text(resolve(load_recipe(name)))
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), f"{name} changed; if intended, run with UPDATE_GOLDEN=1"


def test_no_golden_file_without_a_recipe() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == sorted(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_named_after_its_function_and_runs_in_its_own_folder(name: str) -> None:
    config = load_recipe(name)
    assert RECIPES[name].__name__ == config.recipe == name
    assert config.run_dir == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "learning_rate", "batch", "edge", "text", "template"),
    [
        ("eve7b_stage1", 2e-4, 1024, 800, 2048, "plain"),
        ("eve7b_stage2_1_ld", 1e-4, 1024, 800, 2048, "plain"),
        ("eve7b_stage2_1_hd", 1e-4, 1024, 1600, 4096, "plain"),
        ("eve7b_stage2_2", 2e-5, 512, 1600, 4096, "qwen2"),
        ("eve7b_stage3", 1e-5, 512, 1600, 5000, "qwen2"),
    ],
)
def test_7b_recipes_hold_the_numbers_of_table_5(
    name: str, learning_rate: float, batch: int, edge: int, text: int, template: str
) -> None:
    config = load_recipe(name)
    optim, data = config.optim, config.data
    assert (optim.peak_lr, optim.patch_embedding_lr) == (learning_rate, learning_rate)
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps) == (0.9, 0.999, 1e-8)
    assert (optim.weight_decay, optim.warmup_fraction, optim.clip_grad) == (0.0, 0.03, None)
    assert (config.batch.unit, config.batch.size) == ("samples", batch)
    assert (data.image_edge, data.max_text_tokens, data.template) == (edge, text, template)
    assert (config.train.epochs, config.train.dtype) == (1.0, "bf16")
    assert (config.parallel.world_size, config.parallel.data) == (128, 32)


@pytest.mark.parametrize("family", ["eve7b", "eve_tiny", "smollm2"])
def test_each_stage_starts_from_the_run_before_and_copies_the_llm_once(family: str) -> None:
    configs = [RECIPES[name]() for name in RECIPES if name.startswith(f"{family}_")]
    for before, after in itertools.pairwise(configs):
        assert after.checkpoint.load_weights_from == before.run_dir
        assert after.checkpoint.copy_text_to_vision == (
            after.model.split.any and not before.model.split.any
        )
    assert sum(config.checkpoint.copy_text_to_vision for config in configs) == 1


@pytest.mark.parametrize("stage", ["stage1", "stage2_2", "stage3"])
def test_small_recipes_have_the_shape_of_the_7b_ones(stage: str) -> None:
    big = load_recipe(f"eve7b_{stage}")
    for family in ("eve_tiny", "smollm2"):
        small = load_recipe(f"{family}_{stage}")
        assert small.stage == big.stage
        assert small.model.split == big.model.split
        assert small.data.template == big.data.template


def test_unknown_recipe_names_close_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"there is no recipe 'eve7b_stage22'; did you mean eve7b_stage2_2"
    ):
        load_recipe("eve7b_stage22")


def test_unknown_recipe_without_close_ones_lists_all() -> None:
    with pytest.raises(ConfigError, match="there are eve7b_stage1, eve7b_stage2_1_ld"):
        load_recipe("zzz")
