# SPDX-License-Identifier: Apache-2.0
"""The benchmarks compare like with like: the official form computes our loss and gradients, both forms hold the same
samples, and a result says where it was measured. No time is asserted."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

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


def compare_forms(stage: str, split: SplitConfig | None, recompute: bool) -> dict[str, Any]:
    """Loss and gradients of one global batch in both forms, by official names; runs in a gloo worker."""
    from checkpoints_convert.tensors import eve_to_hf
    from megatron_eve.loop.step import forward_backward
    from megatron_eve.parallel.groups import init_model_parallel
    from tools.bench.contenders import OfficialStep, OurStep
    from tools.bench.step import step_inputs

    config = small_config(stage, split)
    state = init_model_parallel(config.parallel, seed=1)
    inputs = step_inputs(first_step(config, packs=2), config=config, micro_batch=3, state=state)
    ours = OurStep(config, state=state)
    generator = torch.Generator().manual_seed(0)
    for param in ours.model.parameters():  # no weight special: biases not zero, branches differ
        noise = torch.randn(param.shape, generator=generator)
        param.data.add_(noise, alpha=0.1 if param.dim() == 1 else 0.02)
    official = OfficialStep(config, weights_of=ours.model, recompute=recompute)
    logged = torch.stack(forward_backward(ours.wrapped, inputs.packs, config=config, state=state))
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

FORMS = {
    "stage 1": ("1", None),
    "stage 2.1": ("2.1", None),
    "stage 2.2": ("2.2", None),
    "FFN only": ("2.2", SplitConfig(norm=False, attention=False, ffn=True)),
    "dense": ("2.2", DENSE),
}


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
    from tools.bench.step import step_inputs

    config = small_config("2.2", ALL)
    state = init_model_parallel(config.parallel, seed=1)
    (batch, *_) = step_inputs(
        first_step(config, packs=1), config=config, micro_batch=3, state=state
    ).padded
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
        ("step", [*SMALL, "--rounds", "1", "--packs", "1", "--stages", "1", "2.2"], 2),
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
    assert gloo1.run(run_program, name, command) == [1], "a result is not overwritten"
    assert (tmp_path / f"{name}.json").read_bytes() == before


@pytest.mark.timeout(300)
def test_memory_of_a_stage_in_fresh_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools.bench.memory import main

    assert main(["--out", str(tmp_path), *SMALL, "--stages", "2.1"]) == 0
    (row,) = json.loads((tmp_path / "memory.json").read_text())["rows"]
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
