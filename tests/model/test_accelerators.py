# SPDX-License-Identifier: Apache-2.0
"""Optional packages: what is refused where they are missing, what the start-up line says, which Adam is taken."""

import dataclasses
from typing import Any

import pytest

from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import GpuConfig, RunConfig
from megatron_eve.errors import MissingHereError


def config(backend: str = "local", **gpu: Any) -> RunConfig:
    recipe = load_recipe("eve7b_stage2_2")
    train = dataclasses.replace(recipe.train, backend=backend)  # type: ignore[arg-type]
    return dataclasses.replace(recipe, train=train, gpu=GpuConfig(**gpu))


def _refusals() -> list[str]:
    from megatron_eve.model.accelerators import refuse_missing_accelerators

    found = []
    for gpu in (dict(fused_weight_gradients=True), dict(fused_rope=True)):
        with pytest.raises(MissingHereError) as caught:
            refuse_missing_accelerators(config(**gpu))
        found.append(str(caught.value))
    refuse_missing_accelerators(config())
    refuse_missing_accelerators(config("te", fused_weight_gradients=True))  # it does that itself
    return found


def test_a_choice_without_its_package_is_refused(gloo1) -> None:  # type: ignore[no-untyped-def]
    ((apex, triton),) = gloo1.run(_refusals)
    assert "needs NVIDIA Apex with its CUDA extensions (fused_weight_gradient_mlp_cuda)" in apex
    assert "needs a GPU and Triton" in triton


def _lines() -> list[str]:
    import importlib.metadata

    from megatron_eve.model.accelerators import accelerators_line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "2.11.0")
        gpu = dict(
            fp8="current", modality_streams=True, fused_weight_gradients=True, fused_rope=True
        )
        return [accelerators_line(config()), accelerators_line(config("te", **gpu))]


def test_the_start_up_line_says_what_is_used(gloo1) -> None:  # type: ignore[no-untyped-def]
    ((plain, chosen),) = gloo1.run(_lines)
    assert plain == (
        "megatron-core's linears in bf16, one stream | Adam from megatron_eve (CPU) | weight gradients added by DDP | "
        "rotary positions by PyTorch"
    )
    assert chosen.startswith(
        "Transformer Engine 2.11.0 in FP8 (current scaling) where a linear is 2048 wide, else bf16, two streams"
    )
    assert "weight gradients by the product | rotary positions by Triton" in chosen


def _adams() -> list[bool]:
    """As on a GPU, with another Adam (twice) and without."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_eve import device
    from megatron_eve.optim.adam import FusedAdam, use_where_no_other

    found = []
    with pytest.MonkeyPatch.context() as patch:
        for have in (True, False):
            patch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", have)
            patch.setattr(distrib_optimizer, "Adam", object)
            patch.setattr(optimizer, "Adam", object)
            patch.setattr(device, "has_gpu", lambda: True)
            use_where_no_other()
            found.append(optimizer.Adam is FusedAdam and distrib_optimizer.Adam is FusedAdam)
    return found


def test_our_adam_is_taken_where_there_is_no_other(gloo1) -> None:  # type: ignore[no-untyped-def]
    """PyTorch's would train, and could not resume: megatron-core cannot store its steps."""
    (found,) = gloo1.run(_adams)
    assert found == [False, True]
