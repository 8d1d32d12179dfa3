# SPDX-License-Identifier: Apache-2.0
"""The start-up plan: its arithmetic, and that it needs neither torch nor data."""

import subprocess
import sys

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.plan import plan_text
from megatron_eve.config.recipes import RECIPES, load_recipe


def lines(recipe: str, *overrides: str, num_samples: int | None) -> dict[str, str]:
    text = plan_text(apply_overrides(load_recipe(recipe), overrides), num_samples=num_samples)
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


def test_plan_of_the_7b_stage_2_1() -> None:
    plan = lines("eve7b_stage2_1_ld", num_samples=29_000_000)
    assert plan["stage"] == "2.1, trains patch_embedding, vision"
    assert plan["weights"] == "from runs/eve7b_stage1, vision branch copied from the text branch"
    assert plan["processes"] == "128 = 16 nodes x 8"
    assert (
        plan["layout"]
        == "128 = tensor 4 x pipeline 1 x context 1 x data 32, with sequence parallelism"
    )
    assert plan["batch"] == "1,024 samples a step = 32 data-parallel ranks x 32.0 on average"
    assert plan["pack"] == "8,192 tokens = 64 x 128 (align)"
    assert plan["steps"] == "28,321 = ceil(1 epochs x 29,000,000 samples / 1,024)"
    assert plan["schedule"].startswith(
        "warm-up 850 steps = ceil(0.03 x 28,321) to 0.0001, cosine to 0, no clipping"
    )
    assert plan["parameters"].startswith(
        "14,156,712,960 = patch_embedding 15,478,272 + vision 6,525,618,176"
    )
    assert plan["trained"] == "6,541,096,448 = 15,478,272 + 6,525,618,176"
    assert plan["memory"].startswith("estimate per rank, activations not counted: 13.33 GiB")


def test_plan_before_the_shards_are_read() -> None:
    plan = lines("eve7b_stage1", num_samples=None)
    assert plan["steps"] == "ceil(1 epochs x samples / 1,024), known once the shards are read"
    assert plan["schedule"].startswith("warm-up 0.03 of the steps to 0.0002")


def test_plan_of_packs_random_weights_and_two_learning_rates() -> None:
    plan = lines(
        "eve_tiny_stage1",
        "batch.unit=packs",
        "batch.size=8",
        "checkpoint.load_weights_from=none",
        "optim.patch_embedding_lr=1e-4",
        "model.vocab_size=511",
        num_samples=None,
    )
    assert plan["weights"] == "random"
    assert plan["batch"] == "8 packs a step = 1 data-parallel ranks x 8; 8,192 tokens = 8 x 1,024"
    assert "(patch embedding 0.0001)" in plan["schedule"]
    assert "clipping at norm 1" in plan["schedule"]
    assert plan["vocabulary"] == "512 = 511 + 1 padding rows"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name: str) -> None:
    assert len(plan_text(load_recipe(name), num_samples=1_000_000).splitlines()) == 17


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_eve.config import overrides, plan, recipes, resolve, text_form; "
        "plan.plan_text(resolve.resolve(recipes.load_recipe('eve7b_stage2_2')), num_samples=None); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
