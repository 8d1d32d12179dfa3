# SPDX-License-Identifier: Apache-2.0
"""Optional packages with faster kernels: which are installed, and one line that says which a run uses.

None is required. NVIDIA Apex is not what PyPI calls `apex` (an unrelated web toolkit); docs/gpu.md says how to get it.
Looks for modules without importing them, unless only an import can tell."""

import importlib
import importlib.metadata
import importlib.util

from megatron_eve import device
from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import MissingHereError

_APEX_WEIGHT_GRADIENT = "fused_weight_gradient_mlp_cuda"
"""Apex's extension that adds a weight gradient to its fp32 buffer; megatron-core's own linears can use it."""


def has_module(name: str) -> bool:
    """Whether `import name` would find something; a parent package is imported, the module itself is not."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def has_fused_weight_gradient() -> bool:
    """Whether megatron-core's linears can add weight gradients to the fp32 buffer by themselves."""
    return device.has_gpu() and has_module(_APEX_WEIGHT_GRADIENT)


def fused_adam_source() -> str:
    """Where the optimizer's kernel comes from; megatron-core takes the first that imports, in this order."""
    if not device.has_gpu():
        return "megatron_eve (CPU)"
    for package, module in (
        ("Transformer Engine", "transformer_engine.pytorch.optimizers"),
        ("Apex", "apex.optimizers"),
    ):
        try:
            if hasattr(importlib.import_module(module), "FusedAdam"):
                return package
        except (ImportError, OSError):  # absent, or its library does not load
            continue
    return "megatron_eve (PyTorch, unfused)"


def refuse_missing_accelerators(config: RunConfig) -> None:
    """Raises: MissingHereError for a choice whose package is missing; nothing slower silently takes its place."""
    gpu = config.gpu
    by_apex = gpu.fused_weight_gradients and config.train.backend == "local"
    if by_apex and not has_fused_weight_gradient():
        raise MissingHereError(
            "gpu.fused_weight_gradients=true with train.backend=local needs NVIDIA Apex with its CUDA extensions "
            f"({_APEX_WEIGHT_GRADIENT}), which is not here; see docs/gpu.md, or set it to false"
        )
    if gpu.fused_rope and not (device.has_gpu() and has_module("triton")):
        raise MissingHereError(
            "gpu.fused_rope=true needs a GPU and Triton; install it with `pip install -c constraints.txt triton` or "
            "set it to false"
        )


def accelerators_line(config: RunConfig) -> str:
    """The kernels of a run, for the start-up log."""
    gpu, backend = config.gpu, config.train.backend
    linears = "megatron-core's linears"
    if backend == "te":
        version = importlib.metadata.version("transformer-engine")
        linears = f"Transformer Engine {version}"
    precision: str = config.train.dtype
    if gpu.fp8 != "none":
        precision = (
            f"FP8 ({gpu.fp8} scaling) where a linear is {gpu.fp8_min_width} wide, else {precision}"
        )
    fused = "by the product" if gpu.fused_weight_gradients else "added by DDP"
    rope = "Triton, with the permutation" if gpu.fused_rope else "PyTorch"
    streams = "two streams" if gpu.modality_streams else "one stream"
    return (
        f"{linears} in {precision}, {streams} | Adam from {fused_adam_source()} | weight gradients {fused} | "
        f"rotary positions by {rope}"
    )
