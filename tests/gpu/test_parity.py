# SPDX-License-Identifier: Apache-2.0
"""Numbers on a GPU against references, with the measures of the GPU benchmark and bounds from the formats' precision.

BF16 keeps 8 bits and E4M3 4: a product of long sums is off by about half a unit of the last place of its inputs,
2^-9 = 0.002 and 2^-5 = 0.03 (gradients in E5M2: 2^-4 = 0.06), relative by Frobenius norm. The bounds leave a factor of
two to four."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_eve.config.schema import GpuConfig
from tools.bench import gpu_full, gpu_layers, gpu_modules, gpu_parity
from tools.bench.gpu_setting import FULL, Rows, Setting

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
BF16, FP8 = 0.01, 0.12
ATTENTION = 0.02  # rounds the probabilities, too, and sums differences of its gradients
SMALL = dataclasses.replace(FULL, layer_tokens=(2048,), fp8_steps=20, rounds=2, images=64)
LOCAL = dataclasses.replace(SMALL, backend="local")


def measured(part: Callable[[Setting, Rows], None], setting: Setting) -> list[dict[str, Any]]:
    rows = Rows(save=lambda rows: None, deadline=time.monotonic() + 600)
    part(setting, rows)
    assert rows.rows and not [row for row in rows.rows if "error" in row], rows.rows
    return rows.rows


@pytest.mark.parametrize("setting", [LOCAL, SMALL], ids=["local", "te"])
def test_modules_are_as_exact_as_their_format(setting: Setting) -> None:
    """Each no further from fp64 than the format allows, and than twice PyTorch's own operators in BF16."""
    for row in measured(gpu_modules.modules, setting):
        fp8 = row["case"].startswith("FP8")
        bound = FP8 if fp8 else ATTENTION if "attention" in row["case"] else BF16
        for name, error in row["errors"].items():
            assert error < bound, (row["case"], name, error)
            if not fp8 and "errors_of_torch" in row:
                assert error < 2 * row["errors_of_torch"][name] + 1e-4, (row["case"], name)
        assert not row.get("gradients_of_frozen_weights")


def test_the_whole_model_is_as_exact_as_its_format() -> None:
    """Loss and gradients against fp32; `te` not worse than megatron-core's own layers in the same dtype."""
    rows = {row["case"]: row for row in measured(gpu_parity.model, SMALL)}
    local, te = rows["local, bf16"], rows["te, bf16"]
    assert te["loss_error"] < 2e-3 and te["median_gradient_error"] < 0.05
    assert te["median_gradient_error"] < 1.5 * local["median_gradient_error"]
    assert max(te["worst_gradient_errors"].values()) < 2 * max(
        local["worst_gradient_errors"].values()
    )
    for name, row in rows.items():
        if "FP8" in name:
            assert row["loss_error"] < 0.02 and row["median_gradient_error"] < 0.3, name


def test_fp8_learns_like_bf16() -> None:
    for row in measured(gpu_parity.fp8, SMALL):
        assert math.isfinite(row["last_loss"]) and row["last_loss"] < row["first_loss"]
        assert abs(row["gap_to_bf16"]) < 0.02, row


def test_two_streams_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitioned layers on two streams, ten times: a race would show now and then."""
    import torch

    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # of cuDNN's attention backward
    bench = gpu_layers.LayerBench(SMALL, tokens=2048)
    one = bench.layer(dense=False)
    two = bench.layer(dense=False, gpu=GpuConfig(modality_streams=True))
    two.load_state_dict(one.state_dict())
    expected = _outputs(bench, one)
    for _ in range(10):
        for found, wanted in zip(_outputs(bench, two), expected, strict=True):
            assert torch.equal(found, wanted)


def _outputs(bench: Any, layer: Any) -> list[Any]:
    import torch

    layer.zero_grad(set_to_none=True)
    x = bench.rows.detach().requires_grad_()
    out, _ = layer(x, packed_seq_params=bench.routing)
    torch.autograd.backward(out, torch.ones_like(out))
    torch.cuda.synchronize()
    return [out.detach(), x.grad, *(param.grad for param in layer.parameters())]


def test_fused_rope_is_as_exact_as_its_format() -> None:
    for row in measured(gpu_layers.kernels, SMALL):
        assert max(row["errors"]["fused"]) < 4e-3
        assert max(row["errors"]["fused"]) < max(row["errors"]["unfused"])


def test_a_layer_with_fused_rope_computes_the_same() -> None:
    from tools.bench.gpu_setting import relative_error

    bench = gpu_layers.LayerBench(SMALL, tokens=2048)
    plain = bench.layer(dense=False)
    fused = bench.layer(dense=False, gpu=GpuConfig(fused_rope=True))
    fused.load_state_dict(plain.state_dict())
    for found, wanted in zip(_outputs(bench, fused), _outputs(bench, plain), strict=True):
        assert relative_error(found, wanted) < BF16


def test_the_official_form_and_the_dense_layer_run() -> None:
    """What `layers` compares; its figures are the benchmark's."""
    assert len(measured(gpu_layers.layers, SMALL)) == 6


def test_decoding_on_the_gpu_is_close_to_pillow_and_holds_no_memory() -> None:
    """Over 3,000 images; the first quarter fills DALI's pools."""
    many = dataclasses.replace(SMALL, images=3000)
    rows = {row["case"]: row for row in measured(gpu_full.images, many)}
    gpu = rows["DALI on the GPU"]
    if "skipped" in gpu:
        pytest.skip(gpu["skipped"])
    assert gpu["mean_difference_to_pillow_of_255"] < 1.5
    assert gpu["growth_after_a_quarter_mib"]["gpu"] < 64
    assert gpu["growth_after_a_quarter_mib"]["host"] < 64
