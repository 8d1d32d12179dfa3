# SPDX-License-Identifier: Apache-2.0
"""Every memory term of the planner against bytes counted in a really built tiny model, to the byte."""

import dataclasses

import pytest
import torch

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.schema import ParallelConfig, RunConfig
from megatron_eve.data.sample import VISION_PATCH, Pack
from megatron_eve.model.micro_batch import RankPlace, executed_rows, micro_batch
from tests.metrics.batches import ALIGN, full_pack, padded_pack
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import run_config
from tests.tools.plan_runs import held, kept_bytes
from tools.plan.memory import WORKSPACE, Kept, kept, memory
from tools.plan.mix import PackRows, assumed_mix, pack_rows

RECIPE_OF_STAGE = {"1": "eve_tiny_stage1", "2.1": "eve_tiny_stage2_1", "3": "eve_tiny_stage3"}
TP2_SP = layout(tensor=2, sequence_parallel=True)
BYTES_PER_PATCH = 4 * (3 * 2**2 + 2 * 12) * 4  # windows, pixels and both sides of GELU, fp32


def config_of(stage: str, parallel: ParallelConfig, *, layers: int = 3, **train: str) -> RunConfig:
    recipe = RECIPES[RECIPE_OF_STAGE[stage]]()
    model = tiny_model(recipe.model.split, layers=layers)
    config = run_config(model, parallel, trainable=recipe.stage.trainable, train=train)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, pack_tokens=1280, align=ALIGN)
    )


def rows_of(pack: Pack, config: RunConfig) -> PackRows:
    """Of a real pack, in place of an average one."""
    parallel = config.parallel
    shards = parallel.tensor if parallel.sequence_parallel else 1
    (rank,) = executed_rows(pack, cp_size=1, shards=shards, align=ALIGN)
    return PackRows(
        vision=rank.vision,
        text=rank.text,
        kept_vision=rank.kept_vision,
        kept_text=rank.kept_text,
        labels=rank.labels,
        patches=int((pack.vision_kind == VISION_PATCH).sum()),
        samples=0,
        pairs=0,
    )


def whole(one: Kept, *, layers: int) -> int:
    return one.embedding + (layers - 1) * one.layer + one.last_layer + one.output + one.logits


@pytest.mark.parametrize("train", [{}, {"recompute": "selective"}, {"dtype": "bf16"}], ids=str)
@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_activations_are_what_autograd_keeps(gloo1, stage, train) -> None:  # type: ignore[no-untyped-def]
    config = config_of(stage, layout(), **train)
    pack = padded_pack(config.model, stage=stage)
    (counted,) = gloo1.run(kept_bytes, config, pack)
    assert counted == whole(kept(config, rows_of(pack, config)), layers=3)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_activations_under_tensor_parallelism(gloo2, stage, recompute) -> None:  # type: ignore[no-untyped-def]
    config = config_of(stage, layout(tensor=2), recompute=recompute)
    pack = padded_pack(config.model, stage=stage)
    expected = whole(kept(config, rows_of(pack, config)), layers=3)
    assert gloo2.run(kept_bytes, config, pack) == [expected, expected]


@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_activations_under_sequence_parallelism(gloo2, stage) -> None:  # type: ignore[no-untyped-def]
    """Both ranks together exactly; one of them has a few patches more, and the vision padding is the other's."""
    config = config_of(stage, TP2_SP)
    pack = padded_pack(config.model, stage=stage)
    expected = whole(kept(config, rows_of(pack, config)), layers=3)
    first, second = gloo2.run(kept_bytes, config, pack)
    assert first + second == 2 * expected
    assert abs(first - second) <= ALIGN * BYTES_PER_PATCH


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_activations_under_context_parallelism(gloo2, stage, recompute) -> None:  # type: ignore[no-untyped-def]
    """Each rank from its own rows and patches; the first chunk of a sample, on the first rank, needs no mask."""
    config = config_of(stage, layout(context=2), recompute=recompute)
    pack = full_pack(config.model, stage=stage)  # 16 samples of 80 tokens in chunks of 20
    ranks = gloo2.run(kept_bytes, config, pack)
    executed = executed_rows(pack, cp_size=2, shards=1, align=ALIGN)
    for number, (counted, rank) in enumerate(zip(ranks, executed, strict=True)):
        batch = micro_batch(
            pack,
            place=RankPlace(cp_rank=number, cp_size=2),
            split_attention=config.model.split.attention,
            align=ALIGN,
            device=torch.device("cpu"),
        )
        rows = PackRows(
            vision=2 * rank.vision,
            text=2 * rank.text,
            kept_vision=2 * rank.kept_vision,
            kept_text=2 * rank.kept_text,
            labels=2 * rank.labels,
            patches=2 * len(batch.patches),
            samples=16,
            pairs=0,
        )
        without_mask = 3 * 16 * 20 * 20 * 4 if number == 0 and recompute == "none" else 0
        assert counted == whole(kept(config, rows), layers=3) - without_mask


@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_activations_of_a_pipelines_first_stage(gloo2, stage) -> None:  # type: ignore[no-untyped-def]
    """The patch embedding and half of the layers, none of them the last; two micro-batches of them at once."""
    config = config_of(stage, layout(pipeline=2), layers=4)
    pack = padded_pack(config.model, stage=stage)
    rows = rows_of(pack, config)
    one = kept(config, rows)
    counted, _ = gloo2.run(kept_bytes, config, pack, only_rank=0)
    assert counted == one.embedding + 2 * one.layer
    assert memory(config, rows).activations == 2 * counted


@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_full_recomputation_keeps_the_inputs_of_layers(gloo1, stage) -> None:  # type: ignore[no-untyped-def]
    config = config_of(stage, layout(), recompute="full")
    pack = padded_pack(config.model, stage=stage)
    rows = rows_of(pack, config)
    one = kept(config, rows)
    (counted,) = gloo1.run(kept_bytes, config, pack)
    inputs = 3 * 1280 * 32 * 4
    assert counted == one.embedding + inputs + one.output + one.logits
    planned = memory(config, rows)
    # While the backward computes a layer again, that layer's own tensors are there too.
    assert planned.activations == counted - one.logits + one.layer


@pytest.mark.parametrize(
    "parallel",
    [
        layout(data=2, distributed_optimizer=True),
        layout(tensor=2),
        layout(pipeline=2),
        layout(context=2, distributed_optimizer=True),
    ],
    ids=["dp2", "tp2", "pp2", "cp2"],
)
@pytest.mark.parametrize("stage", RECIPE_OF_STAGE)
def test_weights_gradients_and_optimizer_are_what_a_rank_holds(gloo2, stage, parallel) -> None:  # type: ignore[no-untyped-def]
    """megatron-core pads gradient buffers for the distributed optimizer, by less than 1,024 values here. Of a pipeline
    the estimate puts the final norm on the fullest stage, too, where it is not: one vector too much."""
    config = config_of(stage, parallel, layers=4)
    pack = full_pack(config.model, stage=stage)  # samples that two context-parallel ranks can share
    ranks = gloo2.run(held, config, pack)
    planned = memory(config, pack_rows(config, assumed_mix(config)))
    norm = 4 * config.model.hidden_size * (parallel.pipeline == 2)
    trained_norm = norm * ("text" in config.stage.trainable)
    assert max(rank["weights"] for rank in ranks) == planned.weights - norm
    padding = 4 * 1024 * parallel.distributed_optimizer
    fullest = max(rank["gradients"] for rank in ranks)
    assert 0 <= fullest - (planned.gradients - trained_norm) <= padding
    states = [rank["optimizer"] for rank in ranks]
    shares = parallel.data * parallel.context == 2
    held_state = sum(states) / 2 if shares else max(states)
    assert held_state == pytest.approx(planned.optimizer - 2 * trained_norm, abs=padding)


def test_a_pipeline_holds_more_micro_batches() -> None:
    """1F1B: as many as stages, each of fewer layers; interleaving a little more."""
    config = load_recipe("eve7b_stage2_2")
    rows = pack_rows(config, assumed_mix(config))
    halves = apply_overrides(config, ["parallel.pipeline=2"])
    interleaved = apply_overrides(halves, ["parallel.virtual_pipeline=2"])
    one, two = memory(config, rows), memory(halves, rows)
    layer = kept(config, rows).layer
    embedding = kept(config, rows).embedding
    assert two.activations == 2 * (14 * layer + embedding)
    assert memory(interleaved, rows).activations == pytest.approx(1.25 * two.activations)
    assert (two.logits, one.logits > 0) == (0, True)
    assert one.workspace == WORKSPACE
    parts = (one.weights, one.gradients, one.optimizer, one.activations, one.logits, one.workspace)
    assert one.total == sum(parts)


def test_transformer_engine_keeps_no_second_copy_of_a_norm() -> None:
    """Its norm keeps its input in the activations' type, ours in fp32 and once more in front of the weight."""
    te = load_recipe("eve7b_stage2_2")
    local = apply_overrides(te, ["train.backend=local"])
    rows = pack_rows(te, assumed_mix(te))
    norms = 2 * (rows.all // 4) * te.model.hidden_size * (2 + 2)
    assert kept(local, rows).layer - kept(te, rows).layer == norms
