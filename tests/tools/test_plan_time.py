# SPDX-License-Identifier: Apache-2.0
"""The planner's arithmetic: products against metrics/flops.py, packs, links, the parts of a step, layouts, refusals. No
clock is asked."""

import dataclasses
import json
import math
from dataclasses import replace

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import padded_vocab_size
from megatron_eve.metrics.flops import Work, matrix_products
from tests.repo.tree import REPO
from tools.plan.__main__ import main
from tools.plan.cluster import GPUS, parse_cluster
from tools.plan.gemms import attention_flops, gemms
from tools.plan.layouts import SAMPLES, Setting, plan, plans
from tools.plan.memory import WORKSPACE
from tools.plan.mix import Mix, PackRows, assumed_mix, pack_rows, parse_mix
from tools.plan.rates import assumed
from tools.plan.timing import StepTime, amounts, micro_batches, step_time

A100 = parse_cluster("16x8xA100-40G")


def work_of(rows: PackRows) -> Work:
    """As metrics/flops.py counts it: what is executed, the last layer going on with labelled rows."""
    return Work(
        patches=rows.patches,
        vision=rows.vision,
        text=rows.text,
        pairs=rows.pairs,
        last_vision=rows.kept_vision,
        last_text=rows.kept_text,
        query_vision=rows.vision,
        query_text=rows.text,
        last_pairs=rows.pairs,
        labels=rows.labels,
    )


def setting_of(config: RunConfig, cluster=A100) -> Setting:  # type: ignore[no-untyped-def]
    return Setting(
        mix=assumed_mix(config),
        cluster=cluster,
        rates=assumed(cluster.gpu),
        workspace=WORKSPACE,
        num_samples=SAMPLES.get(config.recipe),
    )


@pytest.mark.parametrize(
    ("recipe", "tensor"),
    [(name, tensor) for name in RECIPES for tensor in (1, 2)
     if name != "eve_tiny_text" and not load_recipe(name).model.num_kv_heads % tensor],
)  # fmt: skip
def test_products_of_all_ranks_are_those_that_flops_counts(recipe: str, tensor: int) -> None:
    config = load_recipe(recipe)
    parallel = replace(
        config.parallel, tensor=tensor, pipeline=1, context=1, sequence_parallel=tensor > 1
    )
    config = replace(config, parallel=parallel)
    rows = pack_rows(config, assumed_mix(config))
    rows = replace(rows, patches=rows.patches // tensor * tensor)
    model = replace(config.model, vocab_size=padded_vocab_size(config.model, tensor=tensor))
    counted = matrix_products(
        model,
        work_of(rows),
        trainable=config.stage.trainable,
        input_requires_grad={"vision": True, "text": True},
    )
    ours: dict[str, int] = {}
    for one in gemms(config, rows):
        total = tensor * one.product_flops * one.products
        ours[one.component] = ours.get(one.component, 0) + total
    for component, total in ours.items():
        assert total == counted[component].total, component
    forward, backward = attention_flops(config, rows)
    attention = counted["attention"]
    assert tensor * forward == attention.forward
    # Kernels that keep no scores compute them again: a product more than the four that are needed.
    assert tensor * backward == attention.input_gradient + attention.forward // 2


def test_an_average_pack_is_one_of_the_packer() -> None:
    config = load_recipe("eve7b_stage2_1_hd")
    rows = pack_rows(config, assumed_mix(config))
    assert rows.all == config.data.pack_tokens
    assert rows.vision % 128 == rows.text % 128 == rows.labels % 128 == 0
    assert rows.samples == pytest.approx(0.99 * 16384 / 1900)
    text_only = pack_rows(load_recipe("eve_tiny_text"), assumed_mix(load_recipe("eve_tiny_text")))
    assert (text_only.vision, text_only.patches) == (16, 0)  # the block that every pack has


def test_micro_batches_fill_every_rank() -> None:
    """512 samples of 2,100 tokens are 66.3 packs of 16,384: three for each of 32 ranks, and 30 of the 96 are empty."""
    config = load_recipe("eve7b_stage2_2")
    mix = assumed_mix(config)
    assert micro_batches(config, mix) == 3
    made = plan(config, setting_of(config))
    assert made.filled == pytest.approx(512 / (0.99 * 16384 / 2100) / 96)
    interleaved = apply_overrides(config, ["parallel.pipeline=4", "parallel.virtual_pipeline=7"])
    assert micro_batches(interleaved, mix) % 4 == 0


def test_links_depend_on_where_a_group_lies() -> None:
    nvlink, network = A100.gpu.nvlink_bytes_per_s, A100.network_bytes_per_s
    assert A100.link(size=8, stride=1) == A100.link(size=2, stride=4) == nvlink
    # DP 32 of TP 4: two of its ranks in a node, and four such groups share the node's network.
    assert A100.link(size=32, stride=4) == network * 2 / 8
    assert A100.link(size=128, stride=1) == network
    assert A100.link(size=2, stride=64) == network / 8


def test_the_parts_of_a_step_by_hand() -> None:
    """TP 4 and DP 32 on 16 x 8, every part from the amounts."""
    config = load_recipe("eve7b_stage2_2")
    rates = assumed(A100.gpu)
    done = amounts(config, assumed_mix(config))
    time = step_time(config, done, rates=rates, cluster=A100)
    assert done.micro_batches == 3
    assert time.products == pytest.approx(
        3 * (done.gemm_flops / (0.75 * 312e12) + done.gemm_calls * rates.gemm_overhead_s)
    )
    assert time.attention == pytest.approx(3 * done.attention_flops / (0.5 * 312e12))
    assert time.memory == pytest.approx(3 * done.memory_bytes / (0.8 * 1.555e12))
    # gather and scatter around two blocks, forward and backward, and trained inputs again: ten of [16384, 3584] bf16
    assert done.tensor_bytes == 28 * 10 * 16384 * 3584 * 2 * 3 / 4
    assert time.tensor == pytest.approx(3 * done.tensor_bytes / (300e9 * rates.link_share))
    one = (time.products + time.attention + time.memory + time.tensor) / 3
    link = 50e9 * 2 / 8 * rates.link_share
    reduce, gather = done.reduce_bytes / link, done.gather_bytes / link
    forward = done.forward_share
    hidden = max(0, reduce - (1 - forward) * one) + max(0, gather - forward * one)
    assert time.data == pytest.approx(hidden)
    assert (time.context, time.pipeline) == (0, 0)
    assert time.total == pytest.approx(sum(dataclasses.astuple(time)))


def test_a_pipeline_pays_its_bubble() -> None:
    config = apply_overrides(load_recipe("eve7b_stage2_2"), ["parallel.pipeline=4"])
    interleaved = apply_overrides(config, ["parallel.virtual_pipeline=7"])
    mix, rates = assumed_mix(config), assumed(A100.gpu)
    done = amounts(config, mix)
    plain = step_time(config, done, rates=rates, cluster=A100)
    busy = plain.products + plain.attention + plain.memory + plain.tensor + plain.context
    one = busy / done.micro_batches
    link = A100.link(size=4, stride=32) * rates.link_share
    transfers = done.micro_batches * done.pipeline_bytes / link
    assert plain.pipeline == pytest.approx(3 * one + transfers)
    many = replace(amounts(interleaved, mix), micro_batches=done.micro_batches)
    shorter = step_time(interleaved, many, rates=rates, cluster=A100)
    assert shorter.pipeline == pytest.approx(3 * one / 7 + 7 * transfers)


def test_recomputation_costs_the_forward_again() -> None:
    base = load_recipe("eve7b_stage2_2")
    mix = assumed_mix(base)
    none, selective, full = (
        amounts(apply_overrides(base, [f"train.recompute={kind}"]), mix)
        for kind in ("none", "selective", "full")
    )
    rows = pack_rows(base, mix)
    forward, _ = attention_flops(base, rows)
    assert selective.attention_flops - none.attention_flops == forward
    assert selective.gemm_flops == none.gemm_flops
    decoder = ("qkv", "proj", "ffn")
    again = sum(g.product_flops * g.count for g in gemms(base, rows) if g.component in decoder)
    assert full.gemm_flops - none.gemm_flops == again
    assert full.tensor_bytes / none.tensor_bytes == 14 / 10


def test_frozen_weights_save_time_and_bytes() -> None:
    frozen = load_recipe("eve7b_stage1")
    trained = apply_overrides(frozen, ["stage.trainable=patch_embedding,text"])
    mix = assumed_mix(frozen)
    before, after = amounts(trained, mix), amounts(frozen, mix)
    assert after.reduce_bytes < before.reduce_bytes / 100
    assert after.gemm_flops / before.gemm_flops == pytest.approx(2 / 3, rel=0.01)
    assert after.tensor_bytes / before.tensor_bytes == 8 / 10


def test_plans_are_split_by_what_fits_and_ordered() -> None:
    config = load_recipe("eve7b_stage2_2")
    fits, others = plans(config, setting_of(config))
    assert fits and others
    assert all(one.memory.total <= 40e9 for one in fits)
    assert all(one.memory.total > 40e9 for one in others)
    assert [one.time.total for one in fits] == sorted(one.time.total for one in fits)
    for one in fits:
        parallel = one.config.parallel
        assert parallel.tensor * parallel.pipeline * parallel.context * parallel.data == 128
        assert one.days == pytest.approx(math.ceil(15e6 / 512) * one.time.total / 86400)
        assert 0 < one.mfu < 0.75 and 0 < one.filled <= 1
    larger, _ = plans(config, setting_of(config, parse_cluster("16x8xH200")))
    assert len(larger) > len(fits)
    assert larger[0].time.total < fits[0].time.total


def test_nothing_fits_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eve7b_stage2_2", "--cluster", "1x2xA100-40G"]) == 2
    error = capsys.readouterr().err
    assert "nothing of eve7b_stage2_2 fits 1x2xA100-40G: the nearest, TP" in error
    assert "of 40 GB" in error and "GB too much (weights " in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eve7b_stage22", "--cluster", "16x8xA100-40G"], "did you mean eve7b_stage2_2"),
        (["eve7b_stage1", "--cluster", "16x8xA100"], "there is no GPU A100, there are A100-40G"),
        (["eve7b_stage1", "--cluster", "16xA100-40G"], "is not NODESxGPUSxGPU"),
        (["eve7b_stage1", "--cluster", "0x8xH100"], "is not NODESxGPUSxGPU"),
        (["eve7b_stage1", "--cluster", "1x8xH100", "--mix", "100"], "is not VISION+TEXT"),
        (["eve7b_stage1", "--cluster", "1x8xH100", "--network-gbs", "0"], "is not a speed"),
        (["eve7b_stage1", "--cluster", "1x8xH100", "--calibration", "none"], "is no calibration"),
        (["calibrate", "nowhere"], "nowhere is no run folder"),
        (["calibrate", "nowhere", "--gpu", "B200"], "--gpu B200: there are A100-40G"),
    ],
)
def test_refusals_name_what_was_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_mixes_are_parsed() -> None:
    assert parse_mix("1700+400/200") == Mix(vision=1700, text=400, labels=200, fill=0.99)
    assert parse_mix("0+150").labels == 150


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eve7b_stage1", "--cluster", "16x8xA100-40G", "--show", "3"]) == 0
    text = capsys.readouterr().out
    assert "constants: assumed from data sheets, compared with no GPU" in text
    assert "the recipe's own layout" in text and "TP4 PP1 CP1 DP32 selective" in text
    assert main(["eve7b_stage1", "--cluster", "2x8xH200", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["memory"]["total"] <= 141e9
    assert rows[0]["time"]["total"] == min(row["time"]["total"] for row in rows)


@pytest.mark.parametrize("recipe", SAMPLES)
def test_the_worked_example_is_what_the_command_prints(recipe: str) -> None:
    """Every cell of docs/planning.md's row of a stage's fastest layout, and the recipe's own beside it."""
    config = load_recipe(recipe)
    text = (REPO / "docs/planning.md").read_text()
    fits, _ = plans(config, setting_of(config))
    for one in (fits[0], plan(config, setting_of(config))):
        held = [f"{value / 1e9:.2f}" for value in dataclasses.astuple(one.memory)]
        cells = [
            f"{one.name} | {' + '.join(held)} = {one.memory.total / 1e9:.2f}",
            f" {100 * one.filled:.0f}% | {one.time.total:.2f} | {one.tokens_per_s:,.0f} | {100 * one.mfu:.0f}% | "
            f"{one.days:.2f} | {one.time.limit}",
        ]
        assert any(all(cell in line for cell in cells) for line in text.splitlines()), cells


def test_every_gpu_has_a_peak() -> None:
    assert {name: round(gpu.peak_flops / 1e12) for name, gpu in GPUS.items()} == {
        "A100-40G": 312, "A100-80G": 312, "H100": 989, "H200": 989
    }  # fmt: skip


def test_the_limit_is_the_largest_part_beside_the_products() -> None:
    parts = dict.fromkeys([field.name for field in dataclasses.fields(StepTime)], 1.0)
    time = StepTime(**parts | {"products": 12.0, "tensor": 5.0})
    assert time.limit == "tensor 21%"
