# SPDX-License-Identifier: Apache-2.0
"""What processes really multiply, counted operator by operator, against the formulas and against the ideal."""

import dataclasses

import pytest

from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.schema import ParallelConfig, RunConfig
from megatron_eve.metrics.flops import executed_flops, ideal_flops
from tests.metrics.batches import ALIGN, full_pack, padded_pack
from tests.metrics.executed import executed_on_rank, products_of_a_linear, step_metrics
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import run_config

MAX_EXCESS = 1.03
TOKENS = 1280
RECIPE_OF_STAGE = {
    "text": "eve_tiny_text",
    "1": "eve_tiny_stage1",
    "2.1": "eve_tiny_stage2_1",
    "2.2": "eve_tiny_stage2_2",
    "3": "eve_tiny_stage3",
}
PACKS = {"full": full_pack, "padded": padded_pack}


def config_of(
    stage: str,
    *,
    layers: int,
    wide: bool = False,
    parallel: ParallelConfig | None = None,
    **changes,
) -> RunConfig:  # type: ignore[no-untyped-def]
    """A stage's split and frozen set, by its recipe, on a tiny model."""
    recipe = RECIPES[RECIPE_OF_STAGE[stage]]()
    model = tiny_model(recipe.model.split, layers=layers)
    if wide:  # linears weigh as much against attention as they do in a model that is worth training
        sizes = dict(hidden_size=128, ffn_hidden_size=512, head_dim=32, vocab_size=512)
        model = dataclasses.replace(model, **sizes)
    config = run_config(model, parallel or layout(), trainable=recipe.stage.trainable, **changes)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, pack_tokens=TOKENS, align=ALIGN)
    )


@pytest.mark.parametrize("kind", PACKS)
@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_executed_is_hardly_more_than_ideal(gloo1, stage, kind) -> None:  # type: ignore[no-untyped-def]
    """The target of every stage. In 12 layers the last one weighs 2.3 times as much as in the 28 of the 7B model, so a
    last layer that computes what nobody reads does not pass."""
    config = config_of(stage, layers=12, wide=True)
    pack = PACKS[kind](config.model, stage=stage)
    fill = (pack.num_real_vision + pack.num_real_text) / TOKENS
    assert fill == 1 if (kind, stage != "text") == ("full", True) else 0.985 < fill < 1
    (executed,) = gloo1.run(executed_on_rank, config, [pack])
    ideal = ideal_flops(pack, model=config.model, trainable=config.stage.trainable)
    assert 1 <= executed / ideal <= MAX_EXCESS, f"{executed:,} / {ideal:,}"


@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_counted_is_what_the_metric_says(gloo1, stage) -> None:  # type: ignore[no-untyped-def]
    """To the last FLOP, over two micro-batches: no product of megatron-core's autograd functions escapes the counter,
    none is in the formula that does not run."""
    config = config_of(stage, layers=3)
    packs = [pack(config.model, stage=stage) for pack in PACKS.values()]
    assert gloo1.run(executed_on_rank, config, packs) == [
        sum(executed_flops(pack, config=config) for pack in packs)
    ]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("stage", ["1", "2.1", "3"])
def test_recomputation_is_counted(gloo1, stage, recompute) -> None:  # type: ignore[no-untyped-def]
    config = config_of(stage, layers=3, train={"recompute": recompute})
    plain = config_of(stage, layers=3)
    pack = padded_pack(config.model, stage=stage)
    (counted,) = gloo1.run(executed_on_rank, config, [pack])
    assert counted == executed_flops(pack, config=config) > executed_flops(pack, config=plain)


@pytest.mark.parametrize("stage", ["1", "2.1", "3"])
@pytest.mark.parametrize(
    "parallel",
    [layout(tensor=2), layout(tensor=2, sequence_parallel=True), layout(pipeline=2)],
    ids=["tp2", "tp2-sp", "pp2"],
)
def test_processes_together(gloo2, stage, parallel) -> None:  # type: ignore[no-untyped-def]
    """Without sequence parallelism each tensor-parallel rank embeds all patches; a vocabulary of 61 is padded to 62."""
    config = config_of(stage, layers=4, parallel=parallel)
    pack = padded_pack(config.model, stage=stage)
    assert sum(gloo2.run(executed_on_rank, config, [pack])) == executed_flops(pack, config=config)


@pytest.mark.parametrize("stage", ["1", "2.1", "3"])
def test_context_parallel_ranks_together(gloo2, stage) -> None:  # type: ignore[no-untyped-def]
    """A CPU's kernel multiplies a late chunk with its whole past and masks; the formula, like a GPU's kernels, counts
    what a token sees. Everything else is equal to the last FLOP, rows that hold no token included."""
    config = config_of(stage, layers=3, parallel=layout(context=2), data={"sample_align": 4})
    pack = padded_pack(config.model, stage=stage)
    counted = gloo2.run(executed_on_rank, config, [pack], behind_masks_too=False)
    assert sum(counted) == executed_flops(pack, config=config)
    assert sum(gloo2.run(executed_on_rank, config, [pack])) > sum(counted)


@pytest.mark.parametrize(
    ("trained", "input_requires_grad", "products"), [(True, True, 3), (False, True, 2)]
)
def test_the_counter_sees_megatrons_backward(  # type: ignore[no-untyped-def]
    gloo1, trained, input_requires_grad, products
) -> None:
    (flops,) = gloo1.run(
        products_of_a_linear, trained=trained, input_requires_grad=input_requires_grad
    )
    assert flops == products * 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    "parallel",
    [layout(tensor=2), layout(data=2), layout(pipeline=2)],
    ids=["tp2", "dp2", "pp2"],
)
def test_a_step_counts_each_pack_once(gloo2, parallel) -> None:  # type: ignore[no-untyped-def]
    """However many processes share a pack."""
    config = config_of("3", layers=2, parallel=parallel)
    first, second = (pack(config.model, stage="3") for pack in PACKS.values())
    packs = [[first], [second]] if parallel.data == 2 else [[first, second]]
    ideal = sum(
        ideal_flops(pack, model=config.model, trainable=config.stage.trainable)
        for pack in (first, second)
    )
    executed = sum(executed_flops(pack, config=config) for pack in (first, second))
    for metrics in gloo2.run(step_metrics, config, packs):
        assert (metrics["ideal_flops"], metrics["executed_flops"]) == (ideal, executed)
