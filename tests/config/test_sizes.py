# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a configuration against the official checkpoint's counts, a grid search, and hand-made numbers."""

from dataclasses import replace

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.sizes import (
    EpochSize,
    largest_image_tokens,
    largest_sample_tokens,
    memory_estimate,
    padded_vocab_size,
    parameter_counts,
    total_steps,
    warmup_steps,
)
from megatron_eve.config.variants import VARIANTS


def test_parameter_counts_are_those_of_the_official_7b_checkpoint() -> None:
    counts = parameter_counts(load_recipe("eve7b_stage2_2").model)
    assert counts["patch_embedding"] == 15_478_272
    assert counts["vision"] == 6_525_618_176
    assert counts["text"] == 7_615_616_512
    assert counts["patch_embedding"] + counts["vision"] == 6_541_096_448
    assert sum(counts.values()) == 14_156_712_960


def test_parameter_counts_follow_split_and_tied_embeddings() -> None:
    model = load_recipe("smollm2_stage2_2").model
    counts = parameter_counts(model)
    # SmolLM2-135M has 134,515,008 parameters without QKV bias; the bias adds 30 x (9 + 2 x 3) x 64.
    assert counts["text"] == 134_515_008 + 30 * 15 * 64
    assert parameter_counts(replace(model, split=VARIANTS["eve-v1.0"]))["vision"] == 0
    assert parameter_counts(replace(model, split=VARIANTS["norm-only"]))["vision"] == 30 * 2 * 576
    assert (
        parameter_counts(replace(model, split=VARIANTS["eve-v1.5"]))["vision"]
        == 30 * 3 * 576 * 1536
    )
    untied = parameter_counts(replace(model, tie_word_embeddings=False))
    assert untied["text"] - counts["text"] == 49152 * 576


def official_tokens(width: int, height: int, *, image_edge: int) -> int:
    """Tokens after the official train-time resize, written out independently (round() is half-to-even as there)."""
    ratio = max((width * height) ** 0.5 / image_edge, 1.0)
    columns, rows = max(round(width / ratio / 32), 1), max(round(height / ratio / 32), 1)
    return rows * columns + rows + 1


@pytest.mark.parametrize("image_edge", [256, 800, 1600])
@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0, 10.0, 50.0])
def test_largest_image_is_an_upper_bound_that_is_nearly_reached(
    image_edge: int, limit: float
) -> None:
    bound = largest_image_tokens(image_edge=image_edge, max_aspect_ratio=limit, pixels_per_token=32)
    side = 20_000  # far above every cap, so the grid over aspect ratios is fine
    found = 0
    for step in range(4001):
        aspect = limit ** (step / 2000 - 1)
        found = max(
            found,
            official_tokens(
                round(side * aspect**0.5), round(side / aspect**0.5), image_edge=image_edge
            ),
        )
    assert found <= bound <= found + max(2, 0.01 * found)


def test_largest_sample_counts_aligned_segments() -> None:
    config = load_recipe("eve_tiny_stage3")
    image = largest_image_tokens(image_edge=256, max_aspect_ratio=4.0, pixels_per_token=32)
    assert largest_sample_tokens(config) == -(-image // 16) * 16 + 256
    longer = apply_overrides(config, ["data.max_text_tokens=257"])
    assert largest_sample_tokens(longer) == largest_sample_tokens(config) + 16
    padded = apply_overrides(config, ["data.sample_align=4"])
    assert largest_sample_tokens(padded) == largest_sample_tokens(config) + 16


def test_vocabulary_is_padded_to_the_tensor_size() -> None:
    model = replace(load_recipe("eve_tiny_stage3").model, vocab_size=513)
    assert [padded_vocab_size(model, tensor=tensor) for tensor in (1, 2, 4)] == [513, 514, 516]


def test_steps_of_an_epoch_let_every_sample_come() -> None:
    config = load_recipe("eve7b_stage1")
    assert total_steps(config, epoch=EpochSize(samples=10_000_000, tokens=1)) == 9766
    assert total_steps(config, epoch=None) is None
    assert (
        total_steps(load_recipe("eve_tiny_stage1"), epoch=None)
        == load_recipe("eve_tiny_stage1").train.steps
    )
    assert warmup_steps(config, steps=9766) == 293


def test_epoch_smaller_than_a_batch_is_one_step() -> None:
    assert total_steps(load_recipe("eve7b_stage1"), epoch=EpochSize(samples=1023, tokens=1)) == 1


def test_memory_of_a_hand_counted_rank() -> None:
    config = load_recipe("eve7b_stage2_2")
    # Tensor parallelism 4 on one stage: norms (2 x 2 x 28 + 1) x 3584 and the patch embedding are on every rank.
    replicated = (2 * 2 * 28 + 1) * 3584 + 15_478_272
    held = replicated + (14_156_712_960 - replicated) // 4
    estimate = memory_estimate(config)
    assert (estimate.weights, estimate.gradients) == (2 * held, 4 * held)
    assert estimate.optimizer == -(-12 * held // 32)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.optimizer


def test_context_parallelism_holds_the_same_share_of_the_optimizer() -> None:
    """megatron-core spreads it over data- and context-parallel ranks together."""
    config = load_recipe("eve7b_stage2_2")
    halved = apply_overrides(config, ["parallel.context=2", "data.sample_align=4"])
    assert memory_estimate(halved) == memory_estimate(config)


def test_memory_counts_trained_groups_only_and_the_fullest_stage() -> None:
    stage1 = memory_estimate(load_recipe("eve7b_stage1"))
    assert stage1.gradients == 4 * 15_478_272
    whole = memory_estimate(load_recipe("eve7b_stage2_2"))
    halves = memory_estimate(
        apply_overrides(load_recipe("eve7b_stage2_2"), ["parallel.pipeline=2"])
    )
    assert whole.weights / 2 < halves.weights < 0.6 * whole.weights
    sharded, unsharded = (
        apply_overrides(
            load_recipe("smollm2_stage3"),
            ["parallel.pipeline=1", "parallel.virtual_pipeline=1",
             f"parallel.distributed_optimizer={choice}"],
        )
        for choice in ("true", "false")
    )  # fmt: skip
    assert memory_estimate(unsharded).optimizer == 2 * memory_estimate(sharded).optimizer
