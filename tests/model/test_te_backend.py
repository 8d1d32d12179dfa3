# SPDX-License-Identifier: Apache-2.0
"""Backend `te` on a CPU: megatron-core's real wrappers around a stand-in of Transformer Engine's modules.

Equality with the `local` backend to fp32 rounding, checkpoints that know no backend, and which linears compute in FP8.
What only a GPU can tell, the kernels' numbers and speed, is in tests/gpu."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_eve.config.schema import GpuConfig, RunConfig
from megatron_eve.errors import ConfigError
from tests.support.canonical import assemble
from tests.support.fresh import save_fresh
from tests.support.te_runs import (
    PoolWithStandIn,
    flags_after_announcing_a_step,
    loss_and_gradients,
    precision_of_linears,
    resave,
    workspaces_by_stream,
)
from tests.support.tiny import ALL, DENSE, SplitConfig, layout, tiny_model
from tests.support.train_once import read_weights, run_config

FFN_ONLY = SplitConfig(norm=False, attention=False, ffn=True)
NORM_ONLY = SplitConfig(norm=True, attention=False, ffn=False)
LAYOUTS = {
    "dp2": layout(data=2),
    "tp2": layout(tensor=2),
    "tp2-sp": layout(tensor=2, sequence_parallel=True),
}


@pytest.fixture(scope="module")
def te2():  # type: ignore[no-untyped-def]
    """Two processes with the stand-in."""
    pool = PoolWithStandIn(2)
    yield pool
    pool.close()


def with_te(config: RunConfig, **gpu: Any) -> RunConfig:
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, backend="te"), gpu=GpuConfig(**gpu)
    )


@pytest.fixture(scope="module")
def weights(te2, tmp_path_factory):  # type: ignore[no-untyped-def]
    """Folder of weights written by the local backend, by name of the split."""
    folder = tmp_path_factory.mktemp("weights")
    splits = {"all": ALL, "dense": DENSE, "ffn": FFN_ONLY, "norm": NORM_ONLY}
    for name, split in splits.items():
        te2.run(save_fresh, run_config(tiny_model(split), layout(data=2)), str(folder / name))
    return {name: (tiny_model(split), str(folder / name)) for name, split in splits.items()}


@pytest.mark.parametrize(
    ("split", "place"),
    [("all", "dp2"), ("all", "tp2"), ("all", "tp2-sp"), ("ffn", "tp2-sp"), ("norm", "tp2-sp")],
)
def test_equals_the_local_backend(te2, weights, split, place):  # type: ignore[no-untyped-def]
    """Loss and every gradient; splits in which norm and linear share a module, and in which they cannot."""
    model, folder = weights[split]
    config = run_config(model, LAYOUTS[place])
    local, te = (te2.run(loss_and_gradients, c, folder) for c in (config, with_te(config)))
    torch.testing.assert_close(torch.tensor(te[0][0]), torch.tensor(local[0][0]), rtol=1e-6, atol=0)
    expected, found = (assemble(grads for _, grads in ranks) for ranks in (local, te))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gap = float((found[name] - gradient).abs().max())
        assert gap <= 2e-5 * float(gradient.abs().max()) + 1e-7, f"{name}: {gap}"


@pytest.mark.parametrize("split", ["all", "dense", "ffn"])
def test_checkpoints_know_no_backend(te2, gloo1, weights, tmp_path, split):  # type: ignore[no-untyped-def]
    """local -> te at another layout -> local: the same names and bits, and the parameters really had other names."""
    model, folder = weights[split]
    te = with_te(run_config(model, layout(tensor=2, sequence_parallel=True)))
    names, _ = te2.run(resave, te, folder, str(tmp_path / "te"))
    assert any(name.endswith("layer_norm_weight") for name in names)
    assert not any("input_layernorm" in name for name in names)
    (before,) = gloo1.run(read_weights, model, folder)
    (after,) = gloo1.run(read_weights, model, str(tmp_path / "te"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
def test_linears_that_are_wide_enough_compute_in_fp8(te2, weights, recipe):  # type: ignore[no-untyped-def]
    """All of them at a hidden size of 32, once for this rank's one micro-batch; no two modalities share a scale."""
    model, folder = weights["all"]
    config = with_te(run_config(model, layout(data=2)), fp8=recipe, fp8_min_width=32)
    found, _ = te2.run(precision_of_linears, config, folder)
    assert len(found) == 4 * 4 * 2
    assert all(one["bf16"] == 0 and one["fp8"] == 1 for one in found.values())
    for name, vision in found.items():
        if ".vision" in name and "layers.3" not in name:  # the last layer keeps text rows only
            text = found[name.replace(".vision", ".text")]
            assert vision["scales"]["input"] != text["scales"]["input"], name


def test_narrow_linears_and_chosen_layers_stay_in_bf16(te2, weights):  # type: ignore[no-untyped-def]
    """On one of two tensor ranks proj is 16 wide at its input, fc2 24, qkv 32 and fc1 32: only the last two remain."""
    model, folder = weights["all"]
    config = with_te(
        run_config(model, layout(tensor=2)),
        fp8="current",
        fp8_min_width=32,
        bf16_first_layers=1,
        bf16_last_layers=1,
    )
    found, _ = te2.run(precision_of_linears, config, folder)
    for name, one in found.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        wide = "linear_qkv" in name or "linear_fc1" in name
        expected = (2, 0) if wide and layer in (1, 2) else (0, 2)
        assert (one["fp8"], one["bf16"]) == expected, name


def test_fp8_is_close_to_bf16_and_not_equal(te2, weights):  # type: ignore[no-untyped-def]
    model, folder = weights["all"]
    config = with_te(run_config(model, layout(tensor=2)))
    fp8 = dataclasses.replace(config, gpu=GpuConfig(fp8="current", fp8_min_width=32))
    plain, quantized = (te2.run(loss_and_gradients, c, folder)[0][0] for c in (config, fp8))
    gap = abs(quantized[0] / plain[0] - 1)
    assert 1e-7 < gap < 0.02


def test_recomputation_in_fp8_changes_nothing(te2, weights):  # type: ignore[no-untyped-def]
    """megatron-core recomputes FP8 layers through Transformer Engine's own checkpoint function."""
    model, folder = weights["all"]
    config = with_te(run_config(model, layout(tensor=2)), fp8="current", fp8_min_width=32)
    full = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="full"))
    kept, recomputed = (te2.run(loss_and_gradients, c, folder) for c in (config, full))
    assert kept[0][0] == recomputed[0][0]
    expected, found = (assemble(grads for _, grads in ranks) for ranks in (kept, recomputed))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_a_step_requantizes_the_weights_of_both_modalities(te2, weights):  # type: ignore[no-untyped-def]
    """Without it linears would go on with the quantized weights of the step before."""
    model, folder = weights["all"]
    config = with_te(run_config(model, layout(data=2)), fp8="current", fp8_min_width=32)
    flags, _ = te2.run(flags_after_announcing_a_step, config, folder)
    assert len(flags) == 4 * 4 * 2 and all(flags)


@pytest.mark.parametrize("backend", ["local", "te"])
def test_two_streams_change_nothing(te2, weights, backend):  # type: ignore[no-untyped-def]
    model, folder = weights["all"]
    config = run_config(model, layout(tensor=2), train={"backend": backend})
    streams = dataclasses.replace(config, gpu=GpuConfig(modality_streams=True))
    one, two = (te2.run(loss_and_gradients, c, folder) for c in (config, streams))
    assert one[0][0] == two[0][0]
    expected, found = (assemble(grads for _, grads in ranks) for ranks in (one, two))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_products_on_two_streams_share_no_workspace(te2) -> None:  # type: ignore[no-untyped-def]
    found, _ = te2.run(workspaces_by_stream)
    assert found == [True, True, True, False]


def _message_without_transformer_engine() -> str:
    from megatron_eve.model.layer_specs import backend

    with pytest.raises(ConfigError) as caught:
        backend("te")
    return str(caught.value)


def test_without_transformer_engine_the_message_says_what_to_do(gloo1):  # type: ignore[no-untyped-def]
    (message,) = gloo1.run(_message_without_transformer_engine)
    assert "install the gpu extra or use train.backend=local" in message
