# SPDX-License-Identifier: Apache-2.0
"""Every layout computes what the plain single-process reference computes: loss and every parameter's gradient.

A loss alone proves nothing (a missing all-reduce leaves it bit-equal); so each gradient is compared, in real gloo
processes, with weights that went through the converter and a checkpoint."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.support.tiny import ALL, DENSE, SplitConfig, layout, tiny_model
from tests.support.train_once import (
    gradients_of_batch,
    read_weights,
    run_config,
    write_reference_weights,
)

LOSS_RTOL, GRAD_RTOL = 1e-6, 1e-5

SPLITS = {
    "all": ALL,
    "dense": DENSE,
    "ffn": SplitConfig(norm=False, attention=False, ffn=True),
    "norm": SplitConfig(norm=True, attention=False, ffn=False),
}


@pytest.fixture(scope="module", params=["all", "dense", "ffn", "norm", "all-tied"])
def reference(request, gloo1, tmp_path_factory):  # type: ignore[no-untyped-def]
    """Model, its weights folder, and the reference's loss and gradients."""
    name = request.param.removesuffix("-tied")
    model = tiny_model(SPLITS[name], tied=request.param.endswith("tied"))
    folder = tmp_path_factory.mktemp(request.param)
    gloo1.run(write_reference_weights, model, str(folder / "weights"))
    (loss,) = gloo1.run(write_reference_weights, model, str(folder / "gradients"), gradients=True)
    (gradients,) = gloo1.run(read_weights, model, str(folder / "gradients"))
    return model, folder / "weights", loss, gradients


LAYOUTS = {
    "tp2": layout(tensor=2),
    "tp2-sp": layout(tensor=2, sequence_parallel=True),
    "pp2": layout(pipeline=2),
    "pp2-virtual": layout(pipeline=2, virtual=2),
    "dp2": layout(data=2, overlap=True),
    "dp2-distopt": layout(data=2, distributed_optimizer=True, overlap=True),
    "cp2": layout(context=2),
    "cp2-distopt": layout(context=2, distributed_optimizer=True, overlap=True),
}


def assert_equal_gradients(gradients, expected) -> None:  # type: ignore[no-untyped-def]
    """Relative to the largest entry of each parameter's own gradient."""
    assert gradients.keys() == expected.keys()
    for name, want in expected.items():
        scale = want.abs().max()
        assert scale > 0, f"{name} has no gradient in the reference: the test would prove nothing"
        error = float((gradients[name] - want).abs().max() / scale)
        assert error <= GRAD_RTOL, f"{name}: relative error {error:.1e}"


def check(pool, gloo1, reference, parallel, out: Path, **changes) -> None:  # type: ignore[no-untyped-def]
    model, weights, want_loss, want = reference
    config = run_config(model, parallel, **changes)
    losses = pool.run(gradients_of_batch, config, str(weights), str(out))
    assert losses[0] == pytest.approx(want_loss, rel=LOSS_RTOL)
    (gradients,) = gloo1.run(read_weights, model, str(out))
    assert_equal_gradients(gradients, want)


def test_single_process(gloo1, reference, tmp_path):  # type: ignore[no-untyped-def]
    check(gloo1, gloo1, reference, layout(), tmp_path / "out")


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes(gloo1, gloo2, reference, tmp_path, name):  # type: ignore[no-untyped-def]
    check(gloo2, gloo1, reference, LAYOUTS[name], tmp_path / "out")


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(gloo1, gloo2, reference, tmp_path, recompute):  # type: ignore[no-untyped-def]
    parallel = layout(tensor=2, sequence_parallel=True)
    check(gloo2, gloo1, reference, parallel, tmp_path / "out", train={"recompute": recompute})


FOUR = {
    "tp2-sp-pp2": layout(tensor=2, pipeline=2, sequence_parallel=True),
    "tp2-sp-cp2": layout(tensor=2, context=2, sequence_parallel=True),
    "pp2-cp2": layout(pipeline=2, context=2),
    "cp4": layout(context=4),
}


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("reference", ["all", "all-tied", "ffn"], indirect=True)
def test_four_processes(gloo1, gloo4, reference, tmp_path, name):  # type: ignore[no-untyped-def]
    check(gloo4, gloo1, reference, FOUR[name], tmp_path / "out")


@pytest.mark.parametrize("reference", ["all"], indirect=True)
@pytest.mark.parametrize(
    "parallel",
    [layout(tensor=2, sequence_parallel=True), layout(data=2, distributed_optimizer=True)],
    ids=["tp2-sp", "dp2-distopt"],
)
def test_bf16_is_the_reference_rounded(gloo1, gloo2, reference, tmp_path, parallel):  # type: ignore[no-untyped-def]
    """8 bits of mantissa: a relative error of 2^-8 per operation, some dozens of them deep."""
    model, weights, want_loss, want = reference
    config = run_config(model, parallel, train={"dtype": "bf16"})
    losses = gloo2.run(gradients_of_batch, config, str(weights), str(tmp_path / "out"))
    assert losses[0] == pytest.approx(want_loss, rel=2**-7)
    (gradients,) = gloo1.run(read_weights, model, str(tmp_path / "out"))
    for name, exact in want.items():
        error = float((gradients[name] - exact).norm() / exact.norm())
        assert error < 0.1, f"{name}: {error:.3f}"


@pytest.mark.parametrize("reference", ["all"], indirect=True)
def test_a_missing_all_reduce_is_noticed(gloo1, gloo2, reference, tmp_path):  # type: ignore[no-untyped-def]
    """The mutation: without the sequence-parallel all-reduce the loss is the same, but not the norms' gradients."""
    model, weights, want_loss, want = reference
    config = run_config(model, layout(tensor=2, sequence_parallel=True))
    out = tmp_path / "out"
    losses = gloo2.run(gradients_of_batch, config, str(weights), str(out), drop_all_reduce=True)
    assert losses[0] == pytest.approx(want_loss, rel=LOSS_RTOL)
    (gradients,) = gloo1.run(read_weights, model, str(out))
    wrong = {n for n in want if not torch.allclose(gradients[n], want[n], rtol=1e-3, atol=1e-6)}
    assert "decoder.layers.0.input_layernorm.vision.weight" in wrong
    assert "decoder.layers.0.mlp.linear_fc1.vision.weight" not in wrong


def test_random_weights_do_not_depend_on_tensor_parallelism(gloo1, gloo2, tmp_path):  # type: ignore[no-untyped-def]
    from tests.support.fresh import save_fresh

    model = dataclasses.replace(tiny_model(), vocab_size=64)  # no padding rows for either size
    gloo1.run(save_fresh, run_config(model, layout()), str(tmp_path / "a"))
    gloo2.run(save_fresh, run_config(model, layout(tensor=2)), str(tmp_path / "b"))
    (one,) = gloo1.run(read_weights, model, str(tmp_path / "a"))
    (two,) = gloo1.run(read_weights, model, str(tmp_path / "b"))
    assert all(torch.equal(one[name], two[name]) for name in one)
