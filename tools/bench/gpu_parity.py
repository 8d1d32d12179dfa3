# SPDX-License-Identifier: Apache-2.0
"""Parts `model` and `fp8` of the GPU benchmark: how far the whole model's numbers are from a reference.

`model`: loss and every gradient in BF16, on both backends, and in FP8, against fp32. `fp8`: losses of some hundred
steps against BF16's. Errors are relative, by Frobenius norm."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eve.config.megatron import PLAIN_GPU
from megatron_eve.config.schema import GpuConfig, RunConfig
from megatron_eve.data.sample import Pack
from megatron_eve.model.build import build_model
from megatron_eve.model.micro_batch import RankPlace, micro_batch
from megatron_eve.model.te import local_name
from megatron_eve.parallel.groups import ParallelState, init_distributed, init_model_parallel
from megatron_eve.training.loss import micro_batch_loss
from tools.bench.contenders import OurStep
from tools.bench.gpu_setting import Rows, Setting, relative_error
from tools.bench.samples import as_pack, steps_of_packs, stream

BackendName = Literal["local", "te"]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelRun:
    """Loss per target and gradients by their names in a `local` model."""

    loss: float
    gradients: dict[str, Tensor]


def model(setting: Setting, rows: Rows) -> None:
    """Part `model`."""
    init_distributed(timeout_s=600)
    config = setting.small_config("2.2")
    state = init_model_parallel(config.parallel, seed=1)
    pack = fixed_packs(config, token_share=setting.parity_model.token_share, count=1)[0]
    weights = _rounded_weights(config, state=state)
    reference = _run_model(config, pack, weights, state=state, backend="local", dtype="fp32")
    contenders: dict[str, tuple[BackendName, GpuConfig]] = {
        f"local, {setting.dtype}": ("local", PLAIN_GPU),
        f"{setting.backend}, {setting.dtype}": (setting.backend, PLAIN_GPU),
    }
    for recipe in setting.recipes:
        gpu = GpuConfig(fp8=recipe, fp8_min_width=256)
        contenders[f"{setting.backend}, FP8 {recipe}"] = (setting.backend, gpu)
    for name, (backend, gpu) in contenders.items():

        def measure(backend: BackendName = backend, gpu: GpuConfig = gpu) -> dict[str, Any]:
            found = _run_model(
                config, pack, weights, state=state, backend=backend, dtype=setting.dtype, gpu=gpu
            )
            return compare_runs(found, reference)

        rows.attempt(name, measure)


def compare_runs(found: ModelRun, expected: ModelRun) -> dict[str, Any]:
    """Relative differences of the loss and of each parameter's gradient, the five largest named."""
    assert found.gradients.keys() == expected.gradients.keys()
    errors = {
        name: relative_error(gradient, expected.gradients[name])
        for name, gradient in found.gradients.items()
    }
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:5]
    return {
        "loss": found.loss,
        "loss_error": abs(found.loss / expected.loss - 1),
        "median_gradient_error": sorted(errors.values())[len(errors) // 2],
        "worst_gradient_errors": {name: errors[name] for name in worst},
    }


def _rounded_weights(config: RunConfig, *, state: ParallelState) -> dict[str, Tensor]:
    """Of a `local` model, such that BF16 holds them exactly."""
    train = dataclasses.replace(config.train, dtype="fp32", backend="local", seed=1)
    (chunk,), _ = build_model(
        dataclasses.replace(config, train=train, gpu=GpuConfig()), state=state
    )
    return {n: p.detach().bfloat16().float().cpu() for n, p in chunk.named_parameters()}


def _run_model(
    config: RunConfig,
    pack: Pack,
    weights: dict[str, Tensor],
    *,
    state: ParallelState,
    backend: BackendName,
    dtype: Literal["bf16", "fp32"],
    gpu: GpuConfig = PLAIN_GPU,
) -> ModelRun:
    train = dataclasses.replace(config.train, dtype=dtype, backend=backend)
    (chunk,), _ = build_model(dataclasses.replace(config, train=train, gpu=gpu), state=state)
    for name, param in chunk.named_parameters():
        param.data.copy_(weights[local_name(name)])
    batch = micro_batch(
        pack,
        place=RankPlace(),
        split_attention=config.model.split.attention,
        align=config.data.align,
        device=state.device,
    )
    loss = micro_batch_loss(chunk(batch), batch=batch)
    total = loss.numerator / pack.label_targets.numel()
    torch.autograd.backward(total)
    gradients = {
        local_name(name): param.grad.float().cpu()
        for name, param in chunk.named_parameters()
        if param.grad is not None
    }
    return ModelRun(float(total.detach()), gradients)


def fixed_packs(config: RunConfig, *, token_share: float, count: int) -> list[Pack]:
    """The same packs every time."""
    samples = stream(config, token_share=token_share, seed=1)
    steps = steps_of_packs(config, samples, packs_per_step=count)
    return [as_pack(pack, config=config) for pack in next(steps).packs]


def fp8(setting: Setting, rows: Rows) -> None:
    """Part `fp8`: the same few packs again and again, so that the loss falls far in few steps."""
    init_distributed(timeout_s=600)
    base = setting.small_config("2.2")
    base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, peak_lr=3e-4))
    packs = fixed_packs(base, token_share=setting.parity_model.token_share, count=4)
    curves: dict[str, list[float]] = {}
    fp8_choices = (GpuConfig(fp8=recipe, fp8_min_width=256) for recipe in setting.recipes)
    for gpu in (PLAIN_GPU, *fp8_choices):
        recipe = gpu.fp8

        def measure(recipe: str = recipe, gpu: GpuConfig = gpu) -> dict[str, Any]:
            config = dataclasses.replace(base, gpu=gpu)
            state = init_model_parallel(config.parallel, seed=1)
            ours = OurStep(config, state=state)
            steps = range(setting.fp8_steps)
            curves[recipe] = [ours.step([packs[step % len(packs)]]) for step in steps]
            return _summary(curves[recipe], against=curves.get("none", curves[recipe]))

        rows.attempt(setting.dtype if recipe == "none" else f"FP8 {recipe}", measure)


def _summary(losses: list[float], *, against: list[float]) -> dict[str, Any]:
    """Mean of the last tenth, and every tenth step of the curve."""
    tail = max(1, len(losses) // 10)
    last, other = (sum(curve[-tail:]) / tail for curve in (losses, against))
    return {
        "first_loss": losses[0],
        "last_loss": last,
        "gap_to_bf16": last / other - 1,
        "largest_gap_of_a_step": max(abs(a / b - 1) for a, b in zip(losses, against, strict=True)),
        "curve": [round(value, 5) for value in losses[:: max(1, len(losses) // 20)]],
    }
