# SPDX-License-Identifier: Apache-2.0
"""The start-up plan: its arithmetic, and that it needs neither torch nor data."""

import re
import subprocess
import sys

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.run_summary import plan_text, rounding_advice
from megatron_eve.config.sizes import EpochSize

LD = EpochSize(samples=29_000_000, tokens=29_000_000 * 458)  # a mean of 458 tokens


def lines(recipe: str, *overrides: str, epoch: EpochSize | None) -> dict[str, str]:
    text = plan_text(apply_overrides(load_recipe(recipe), overrides), epoch=epoch)
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


def test_plan_of_the_7b_stage_2_1() -> None:
    plan = lines("eve7b_stage2_1_ld", epoch=LD)
    assert plan["stage"] == "2.1, trains patch_embedding, vision"
    assert plan["weights"] == "from runs/eve7b_stage1, vision branch copied from the text branch"
    assert plan["processes"] == "128 = 16 nodes x 8"
    assert (
        plan["layout"]
        == "128 = tensor 4 x pipeline 1 x context 1 x data 32, with sequence parallelism"
    )
    assert plan["batch"] == (
        "1,024 samples a step = 32 data-parallel ranks x 32.0 on average; they fill 57.2 of 64 packs: 89.5%"
    )
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
    plan = lines("eve7b_stage1", epoch=None)
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
        epoch=None,
    )
    assert plan["weights"] == "random"
    assert plan["batch"] == "8 packs a step = 1 data-parallel ranks x 8; 8,192 tokens = 8 x 1,024"
    assert "(patch embedding 0.0001)" in plan["schedule"]
    assert "clipping at norm 1" in plan["schedule"]
    assert plan["vocabulary"] == "512 = 511 + 1 padding rows"


def test_plan_of_packs_counted_in_epochs() -> None:
    """28,321 steps of samples fill 57.2 packs each; 64 full ones hold 11.8% more."""
    packs = ("batch.unit=packs", "batch.size=64")
    plan = lines("eve7b_stage2_1_ld", *packs, epoch=LD)
    assert plan["steps"] == "25,334 = ceil(1 epochs x 13,282,000,000 tokens / (64 x 8,192))"
    plan = lines("eve7b_stage2_1_ld", *packs, epoch=None)
    assert plan["steps"] == "ceil(1 epochs x tokens / (64 x 8,192)), known once the shards are read"


@pytest.mark.parametrize(
    ("tokens_a_sample", "advice"),
    [
        (458, "fill 57.2 packs, and 64 are computed .* batch.size=64 takes 1,145 samples a step"),
        (300, "fill 37.5 packs, and 64 are computed .* batch.size=32 takes 874 samples a step"),
        (510, None),  # 63.75 of 64
    ],
)
def test_packs_that_stay_empty_bring_advice(tokens_a_sample: int, advice: str | None) -> None:
    config = load_recipe("eve7b_stage2_1_ld")
    epoch = EpochSize(samples=1_000_000, tokens=1_000_000 * tokens_a_sample)
    text = rounding_advice(config, epoch=epoch)
    assert text is None if advice is None else text and re.search(advice, text)
    if text is not None:
        size = re.search(r"batch\.size=(\d+)", text)
        taken = apply_overrides(config, ["batch.unit=packs", f"batch.size={size and size[1]}"])
        assert rounding_advice(taken, epoch=epoch) is None


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name: str) -> None:
    assert len(plan_text(load_recipe(name), epoch=LD).splitlines()) == 18


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        (
            "eve7b_stage1",
            "official: mean over groups of 8 samples in data order of each .* token mean",
        ),
        ("eve_tiny_stage3", "global_tokens: mean over all label tokens of a step"),
    ],
)
def test_the_plan_says_which_loss_is_trained(recipe: str, line: str) -> None:
    assert re.search(rf"^loss +{line}$", plan_text(load_recipe(recipe), epoch=None), re.MULTILINE)


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys; from megatron_eve.config import overrides, recipes, resolve, run_summary, text_form; "
        "run_summary.plan_text(resolve.resolve(recipes.load_recipe('eve7b_stage2_2')), epoch=None); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
