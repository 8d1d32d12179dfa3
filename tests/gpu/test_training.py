# SPDX-License-Identifier: Apache-2.0
"""The trainer's step on a GPU: optimizer kernels, fused weight gradients, recomputation in FP8, checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.config.schema import GpuConfig
from tools.bench.gpu_setting import FULL

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def losses(steps: int, *, recompute: str = "none", backend: str = "te", **gpu: Any) -> list[float]:
    """Of a small model on four packs."""
    from megatron_eve.parallel.groups import init_distributed, init_model_parallel
    from tools.bench.contenders import OurStep
    from tools.bench.gpu_parity import fixed_packs

    init_distributed(timeout_s=600)
    setting = dataclasses.replace(FULL, backend=backend)  # type: ignore[arg-type]
    config = setting.small_config("2.2", **gpu)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, recompute=recompute),  # type: ignore[arg-type]
        optim=dataclasses.replace(config.optim, peak_lr=3e-4, warmup_fraction=0.0),
    )
    packs = fixed_packs(config, token_share=setting.parity_model.token_share, count=4)
    ours = OurStep(config, state=init_model_parallel(config.parallel, seed=1))
    return [ours.step([packs[step % 4], packs[(step + 1) % 4]]) for step in range(steps)]


def test_the_loss_falls() -> None:
    found = losses(20)
    assert found[-1] < found[0] - 0.5


def test_fused_weight_gradients_change_rounding_only() -> None:
    """The product adds in fp32 what DDP else adds from BF16."""
    plain, fused = losses(5), losses(5, fused_weight_gradients=True)
    assert fused == pytest.approx(plain, rel=2e-3)


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_recomputation_in_fp8_gives_the_same_losses(recipe: str) -> None:
    gpu = dict(fp8=recipe, fp8_min_width=256)
    assert losses(3, recompute="full", **gpu) == pytest.approx(losses(3, **gpu), rel=1e-3)


def test_weights_written_by_te_load_into_local(tmp_path: Path) -> None:
    from megatron_eve.checkpoint.weights import load_weights
    from megatron_eve.model.build import build_model
    from megatron_eve.model.te import local_name
    from megatron_eve.parallel.groups import init_distributed, init_model_parallel
    from tests.support.save_weights import save_weights

    init_distributed(timeout_s=600)
    config = FULL.small_config("2.2")
    state = init_model_parallel(config.parallel, seed=1)
    models = {
        backend: build_model(
            dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, dtype="bf16", backend=backend, seed=seed),
                gpu=GpuConfig(),
            ),
            state=state,
        )[0]
        for seed, backend in enumerate(("te", "local"))
    }
    save_weights(models["te"], tmp_path / "weights", config_text="")
    load_weights(models["local"], tmp_path / "weights", copy_text_to_vision=False)
    loaded = dict(models["local"][0].named_parameters())
    for name, param in models["te"][0].named_parameters():
        assert torch.equal(param, loaded[local_name(name)]), name
