# SPDX-License-Identifier: Apache-2.0
"""The benchmarks compare like with like: the official form computes our loss and gradients on its scripts' own batches
in every stage, both forms hold the same samples, FLOPs are those counted, and a result says where it was measured. No
time is asserted."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.repo.tree import text_of
from tests.support.tiny import ALL, DENSE, SplitConfig

LOSS_RTOL, GRAD_RTOL = 1e-6, 1e-5
SCALE = {"hidden_size": 256, "num_layers": 2, "token_share": 1 / 32}
SMALL = ["--hidden", "256", "--layers", "1", "--token-share", "0.03125"]


def small_config(stage: str, split: SplitConfig | None = None) -> Any:
    from tools.bench.setting import Scale, scaled_config

    config = scaled_config(stage, scale=Scale(**SCALE))
    model = dataclasses.replace(config.model, split=split or config.model.split)
    return dataclasses.replace(config, model=model)


def first_step(config: Any, *, packs: int) -> Any:
    from tools.bench.samples import steps_of_packs, stream

    samples = stream(config, token_share=SCALE["token_share"], seed=3)
    return next(steps_of_packs(config, samples, packs_per_step=packs))


def first_inputs(stage: str, config: Any) -> Any:
    """A step as the benchmark makes it; of stage 3 the first that has a micro-batch of text alone."""
    from tools.bench.step import stage_inputs

    tokens = 2 * config.data.pack_tokens
    share = SCALE["token_share"]
    steps = stage_inputs(
        stage, config, device=torch.device("cpu"), token_share=share, step_tokens=tokens
    )
    if stage != "3":
        return next(steps)
    return next(one for one in steps if not all(batch.images for batch in one.padded))


def compare_forms(stage: str, split: SplitConfig | None, recompute: bool) -> dict[str, Any]:
    """Loss and gradients of one global batch in both forms, by official names; runs in a gloo worker."""
    from checkpoints_convert.tensors import eve_to_hf
    from megatron_eve.parallel.groups import init_model_parallel
    from megatron_eve.training.step import forward_backward
    from tools.bench.contenders import OfficialStep, OurStep

    config = small_config(stage, split)
    state = init_model_parallel(config.parallel, seed=1)
    inputs = first_inputs(stage, config)
    ours = OurStep(config, state=state)
    generator = torch.Generator().manual_seed(0)
    for param in ours.model.parameters():  # no weight special: biases not zero, branches differ
        noise = torch.randn(param.shape, generator=generator)
        param.data.add_(noise, alpha=0.1 if param.dim() == 1 else 0.02)
    official = OfficialStep(config, weights_of=ours.model, recompute=recompute)
    logged = torch.stack(
        forward_backward(ours.training.wrapped, inputs.packs, config=config, state=state)
    )
    total = torch.zeros(())
    for batch in inputs.padded:
        loss = official.form(batch) / inputs.num_targets
        torch.autograd.backward(loss)
        total += loss.detach()
    gradients = {
        name: param.main_grad if param.requires_grad else torch.zeros_like(param)
        for name, param in ours.model.named_parameters()
    }
    theirs = dict(official.form.named_parameters())
    return {
        "ours": float(logged[:, 0].sum() / logged[:, 1].sum()),
        "official": float(total),
        "our_gradients": eve_to_hf(gradients, config.model),
        "official_gradients": {name: param.grad for name, param in theirs.items()},
        "padded": any(bool((b.lengths < b.ids.shape[1]).any()) for b in inputs.padded),
    }


LAST = f"model.layers.{SCALE['num_layers'] - 1}."
FEEDS_NOTHING = tuple(
    LAST + name
    for name in (
        "self_attn.moe_q_proj",
        "self_attn.moe_o_proj",
        "moe_post_attention_layernorm",
        "moe_mlp",
    )
)
"""Where no vision token carries a label, the last layer's vision rows reach the loss through keys and values only."""

FORMS: dict[str, tuple[str, SplitConfig | None]] = {
    "stage 1": ("1", None),
    "stage 2.1 LD": ("2.1-ld", None),
    "stage 2.1 HD": ("2.1-hd", None),
    "stage 2.2": ("2.2", None),
    "stage 3": ("3", None),
    "FFN only": ("2.2", SplitConfig(norm=False, attention=False, ffn=True)),
    "dense": ("2.2", DENSE),
}


def test_every_run_of_the_curriculum_is_measured_on_the_batches_of_its_script() -> None:
    from megatron_eve.config.recipes import RECIPES
    from tools.bench.setting import CURRICULUM, OFFICIAL
    from tools.bench.step import WANTED_RATIO, command_line

    assert sorted(CURRICULUM.values()) == sorted(n for n in RECIPES if n.startswith("eve7b_"))
    assert CURRICULUM.keys() == OFFICIAL.keys() == WANTED_RATIO.keys()
    assert command_line().parse_args([]).stages == list(CURRICULUM)
    assert {stage for stage, _ in FORMS.values()} == CURRICULUM.keys()
    for stage, recipe in CURRICULUM.items():
        assert OFFICIAL[stage].global_batch == RECIPES[recipe]().batch.size
    assert [stage for stage, one in OFFICIAL.items() if one.grouped_by_length] == ["3"]
    assert [one.micro_batch for one in OFFICIAL.values()] == [8, 4, 2, 2, 2]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_official_form_computes_our_loss_and_gradients(gloo1, form, recompute):  # type: ignore[no-untyped-def]
    (seen,) = gloo1.run(compare_forms, *FORMS[form], recompute)
    assert seen["padded"], "without padding the mask would not be tested"
    assert seen["official"] == pytest.approx(seen["ours"], rel=LOSS_RTOL)
    ours, official = seen["our_gradients"], seen["official_gradients"]
    assert ours.keys() == official.keys()
    trained = {name for name, grad in official.items() if grad is not None}
    assert trained
    for name in ours.keys() - trained:
        assert not ours[name].any(), f"{name} is frozen in the official form only"
    without = {name for name in trained if not official[name].any()}
    assert all(name.startswith(FEEDS_NOTHING) for name in without), without
    for name in trained:
        scale = official[name].abs().max() if name not in without else 1.0
        error = float((ours[name] - official[name]).abs().max() / scale)
        assert error <= (0 if name in without else GRAD_RTOL), f"{name}: relative error {error:.1e}"


def break_a_mask() -> tuple[float, float]:
    """The official form's loss with and without one vision token taken for text; runs in a gloo worker."""
    from megatron_eve.parallel.groups import init_model_parallel
    from tools.bench.contenders import OfficialStep, OurStep

    config = small_config("2.2", ALL)
    state = init_model_parallel(config.parallel, seed=1)
    (batch, *_) = first_inputs("2.2", config).padded
    ours = OurStep(config, state=state)
    form = OfficialStep(config, weights_of=ours.model, recompute=True).form
    with torch.no_grad():
        right = float(form(batch))
        tokens = form._tokens(batch, dtype=torch.float32)
        form._tokens = lambda *_, **__: dataclasses.replace(  # type: ignore[method-assign]
            tokens, vision=torch.zeros_like(tokens.vision)
        )
        return right, float(form(batch))


def test_the_blend_depends_on_its_mask(gloo1):  # type: ignore[no-untyped-def]
    """The mutation: branches differ, so a wrong mask is seen in the loss."""
    ((right, wrong),) = gloo1.run(break_a_mask)
    assert abs(wrong / right - 1) > 1e-4


def counted_and_by_formula(stage: str) -> dict[str, Any]:
    """FLOPs of the benchmark's first step, and what the formulas say; runs in a gloo worker."""
    from megatron_eve.metrics.flops import executed_flops
    from megatron_eve.parallel.groups import init_model_parallel
    from tools.bench.official_form import official_flops
    from tools.bench.step import Pair

    config = small_config(stage)
    state = init_model_parallel(config.parallel, seed=1)
    inputs = first_inputs(stage, config)
    counted = Pair(config, state=state).first_step(inputs)["first_step_flops"]
    model, trainable = config.model, config.stage.trainable
    return counted | {
        "our formula": sum(executed_flops(pack, config=config) for pack in inputs.packs),
        "official formula": sum(
            official_flops(batch, model=model, trainable=trainable) for batch in inputs.padded
        ),
    }


@pytest.mark.parametrize("stage", ["1", "2.1-ld", "2.1-hd", "2.2", "3"])
def test_flops_are_counted_to_the_last_one(gloo1, stage) -> None:  # type: ignore[no-untyped-def]
    """The counter sees every product of both forms, and the formulas, which the figures at 7B's size rest on, say the
    same."""
    (seen,) = gloo1.run(counted_and_by_formula, stage)
    assert seen["ours"] == seen["our formula"]
    assert seen["official"] == seen["official formula"]
    assert seen["ideal"] < seen["ours"] < seen["official"]


def test_both_forms_hold_the_same_samples() -> None:
    from tools.bench.official_form import padded_batch
    from tools.bench.samples import as_pack

    config = small_config("2.1")
    step = first_step(config, packs=2)
    packs = [as_pack(samples, config=config) for samples in step.packs]
    batch = padded_batch(step.in_stream_order, model=config.model, device=torch.device("cpu"))
    useful = sum(pack.num_real_vision + pack.num_real_text for pack in packs)
    assert int(batch.lengths.sum()) == useful
    assert int(batch.is_vision.sum()) == sum(pack.num_real_vision for pack in packs)
    assert len(step.in_stream_order) == sum(len(samples) for samples in step.packs)
    assert {id(s) for s in step.in_stream_order} == {id(s) for pack in step.packs for s in pack}
    # a label is predicted unless it is its sample's first token
    targets = int((batch.labels[:, 1:] != -100).sum())
    assert targets == sum(pack.label_targets.numel() for pack in packs)


def test_stream_repeats_for_a_seed_and_follows_the_template() -> None:
    from tools.bench.samples import stream

    plain, questions = small_config("1"), small_config("2.2")

    def first(config: Any, seed: int) -> list[Any]:
        return list(itertools.islice(stream(config, token_share=0.25, seed=seed), 200))

    same = zip(first(plain, 1), first(plain, 1), strict=True)
    assert all((a.encoded.ids == b.encoded.ids).all() for a, b in same)
    assert all(len(sample.images) == 1 for sample in first(plain, 1))
    without = sum(not sample.images for sample in first(questions, 1))
    assert 2 < without < 25  # one in twenty of 200
    vision = [s.expanded(pixels_per_token=8).is_vision.sum() for s in first(plain, 1)]
    assert max(vision) <= 0.25 * 660 + 40 and min(vision) >= 3


def test_stage_3_deals_words_out_as_the_official_sampler_does() -> None:
    """By hand: longest first, each to the micro-batch that has fewest words and a free place, of equals the first."""
    from tools.bench.samples import even_micro_batches

    words = [3, 9, 1, 5, 7, 2]
    assert even_micro_batches(words, micro_batch=2) == [[1, 2], [4, 5], [3, 0]]  # sums 10, 9, 8
    assert even_micro_batches(words, micro_batch=3) == [[1, 0, 5], [4, 3, 2]]  # 14, 13
    assert even_micro_batches(words, micro_batch=1) == [[1], [4], [3], [0], [5], [2]]
    assert even_micro_batches([4, 4, 4, 4], micro_batch=2) == [[0, 2], [1, 3]]


def micro_batches_of(stage: str, count: int) -> list[Any]:
    from tools.bench.samples import stream
    from tools.bench.setting import OFFICIAL

    official = OFFICIAL[stage]
    samples = stream(small_config(stage), token_share=0.5, seed=3, official=official)
    size = official.micro_batch
    return [list(itertools.islice(samples, size)) for _ in range(count)]


def test_stage_3_groups_by_modality_and_words() -> None:
    """The official sampler does not put samples of like length together: a long one comes with a short one."""
    from tools.bench.samples import even_micro_batches

    def words(batches: list[Any]) -> list[list[int]]:
        return sorted(sorted(sample.encoded.ids.size - 1 for sample in batch) for batch in batches)

    def mixed(batches: list[Any]) -> bool:
        return any(len({bool(sample.images) for sample in batch}) == 2 for batch in batches)

    grouped, random = micro_batches_of("3", 300), micro_batches_of("2.2", 300)
    assert mixed(random) and not mixed(grouped)
    megabatch = [batch for batch in grouped if batch[0].images][:256]  # 512 samples, one step
    assert 3 < sum(not batch[0].images for batch in grouped) < 35  # one in twenty
    found = words(megabatch)
    flat = [count for batch in found for count in batch]
    dealt = even_micro_batches(flat, micro_batch=2)
    assert found == sorted(sorted(flat[i] for i in batch) for batch in dealt)
    middle = sorted(flat)[256]
    assert sum(short <= middle <= long for short, long in found) > 0.95 * 256


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_steps_are_whole_micro_batches_and_full_packs(micro_batch: int) -> None:
    from tools.bench.samples import steps_of_packs, stream

    config = small_config("2.2")
    drawn = list(itertools.islice(stream(config, token_share=SCALE["token_share"], seed=5), 400))
    steps = steps_of_packs(config, iter(drawn), packs_per_step=2, micro_batch=micro_batch)
    place = {id(sample): number for number, sample in enumerate(drawn)}
    taken: list[int] = []
    for step in itertools.islice(steps, 5):
        places = [place[id(sample)] for sample in step.in_stream_order]
        groups = [places[i : i + micro_batch] for i in range(0, len(places), micro_batch)]
        assert all(g == list(range(g[0], g[0] + micro_batch)) for g in groups)
        assert all(g[0] % micro_batch == 0 for g in groups)
        assert len(step.packs) == 2
        sizes = [s.expanded(pixels_per_token=8).ids.size for s in step.in_stream_order]
        assert sum(sizes) > 0.9 * 2 * config.data.pack_tokens
        taken += places
    assert len(set(taken)) == len(taken), "each sample once"
    assert 0 in taken, "the oldest is taken first"


def test_a_step_that_holds_no_micro_batch_is_refused() -> None:
    from tools.bench.report import BenchmarkError
    from tools.bench.samples import steps_of_packs, stream

    config = small_config("1")
    samples = stream(config, token_share=SCALE["token_share"], seed=5)
    with pytest.raises(
        BenchmarkError, match="1 packs of 256 tokens do not hold a micro-batch of 40"
    ):
        next(steps_of_packs(config, samples, packs_per_step=1, micro_batch=40))


def test_scaled_model_keeps_the_proportions_of_7b() -> None:
    from megatron_eve.config.recipes.shapes import qwen2_5_7b
    from tools.bench.setting import Scale, scaled_model

    full = qwen2_5_7b(split=ALL)
    small = scaled_model(ALL, scale=Scale(hidden_size=1024, num_layers=4, token_share=0.25))
    for model in (small, full):
        ffn = model.ffn_hidden_size / model.hidden_size
        head = model.vocab_size / model.num_layers / model.hidden_size
        assert ffn == pytest.approx(5.29, rel=0.02)
        assert head == pytest.approx(1.515, rel=0.02)


def test_wrong_width_is_refused() -> None:
    from tools.bench.report import BenchmarkError
    from tools.bench.setting import Scale, scaled_model

    with pytest.raises(BenchmarkError, match="hidden size 300 is not a multiple of 256"):
        scaled_model(ALL, scale=Scale(hidden_size=300, num_layers=1, token_share=1.0))


def test_interleaved_rounds_turn_and_leave_out_the_warm_up() -> None:
    from tools.bench.report import interleaved_seconds, median_ratio

    calls: list[str] = []
    seconds = interleaved_seconds(
        {"a": lambda n: calls.append(f"a{n}"), "b": lambda n: calls.append(f"b{n}")},
        rounds=2,
        warm_up=1,
    )
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [len(taken.wall) for taken in seconds.values()] == [2, 2]
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]) == 4.0


def run_program(name: str, arguments: list[str]) -> int:
    """A benchmark's main in a gloo worker, which has a process group already."""
    import importlib

    return int(importlib.import_module(f"tools.bench.{name}").main(arguments))


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        (
            "step",
            [*SMALL, "--rounds", "1", "--warm-up", "1", "--step-tokens", "1", "--stages", "1", "3"],
            2,
        ),
        ("split_tax", ["--hidden", "256", "--tokens", "512", "--rounds", "1"], 6),
    ],
)
def test_result_says_where_it_was_measured(gloo1, tmp_path: Path, name, arguments, rows):  # type: ignore[no-untyped-def]
    command = ["--out", str(tmp_path), *arguments]
    assert gloo1.run(run_program, name, command) == [0]
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert {"cpu", "cores", "threads", "torch"} <= result["hardware"].keys()
    assert result["benchmark"] == name and len(result["rows"]) == rows
    before = (tmp_path / f"{name}.json").read_bytes()
    assert gloo1.run(run_program, name, command) == [2], "a result is not overwritten"
    assert (tmp_path / f"{name}.json").read_bytes() == before


@pytest.mark.timeout(300)
def test_memory_of_a_stage_in_fresh_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.bench.memory import main

    assert main(["--out", str(tmp_path), *SMALL, "--stages", "2.1"]) == 0
    result = json.loads((tmp_path / "memory.json").read_text())
    assert result["settings"]["data_parallel"] == 2
    (row,) = result["rows"]
    first, second = row["ranks"]
    # this width needs no padding in the buffers, so the count is exact; tests/optim/test_frozen_memory.py
    assert first["gradient_buffers"] == 4 * first["trained_parameters"]
    assert first["trained_parameters"] < first["parameters"]
    assert row["optimizer_state_all_ranks"] == 8 * first["trained_parameters"]
    assert set(first["traffic_per_step"].values()) == {4 * first["trained_parameters"]}
    assert second["weights"] == first["weights"] == row["estimate"]["weights"]
    assert "| 2.1 | " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["step", "split_tax", "memory"])
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as asked:
        run_program(name, ["--help"])
    assert asked.value.code == 0
    assert f"example: python -m tools.bench.{name} --out runs/bench" in capsys.readouterr().out


def test_make_bench_shows_every_table() -> None:
    makefile = text_of("Makefile")
    (names,) = re.findall(r"for name in ([a-z_ ]+); do", makefile)
    (shown,) = re.findall(r"cat ([a-z_. ]+) > tables\.md", makefile)
    assert shown.split() == [f"{name}.md" for name in names.split()]
