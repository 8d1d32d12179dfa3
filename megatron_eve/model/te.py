# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine 2.11 behind megatron-core's wrappers: which classes, and which of them compute in FP8.

Never run on a GPU yet (docs/gpu.md). Tests on a CPU check every call against the signatures of the release
(tests/model/test_te_signatures.py), and the whole backend, checkpoints and precision policy included, with modules
that have Transformer Engine's interfaces and compute in PyTorch (tests/model/test_te_backend.py).

FP8 facts. megatron-core opens the FP8 context around each layer (transformer_block.py), from its configuration's
`fp8`, `fp8_recipe` and first and last BF16 layers, and tells modules of a step's first micro-batch, on which weights
are quantized anew. Each module owns its scales, so that vision and text, whose ranges differ, share none. A delayed
scale is state (`_extra_state`), which checkpoints leave out: a resumed run starts its history anew. We do not use
GroupedLinear: it asks only the first group whether any weight needs a gradient."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from megatron_eve.errors import MissingHereError


def classes() -> dict[str, type]:
    """Fields of layer_specs.Backend.

    Raises: MissingHereError if Transformer Engine cannot be imported.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that does not fit this CUDA
        raise MissingHereError(
            f"train.backend=te needs Transformer Engine, which does not import here ({error}); "
            "install the gpu extra or use train.backend=local"
        ) from error
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return dict(
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm=TENorm,
        core_attention=TEDotProductAttention,
        norm_column_linear=TELayerNormColumnParallelLinear,
    )


def keep_narrow_linears_in_bf16(chunks: Sequence[torch.nn.Module], *, min_width: int) -> int:
    """Take every linear that is narrower than `min_width` on this rank, at its input or output, out of FP8.

    By width and not by rows: rows differ from pack to pack and rank to rank, and modules that exchange scales must do
    so everywhere. Uses megatron-core's per-module override. Returns the number of linears that remain in FP8."""
    from megatron.core.extensions.transformer_engine import (
        TEQuantizationParams,
        TEQuantizationRecipe,
    )

    in_bf16 = TEQuantizationParams(
        training_recipe=TEQuantizationRecipe(), evaluation_recipe=TEQuantizationRecipe()
    )
    remaining = 0
    for chunk in chunks:
        for module in chunk.modules():
            if not hasattr(module, "te_quant_params"):
                continue
            weight: Any = module.weight
            if min(weight.shape) < min_width:
                module.te_quant_params = in_bf16
            else:
                remaining += 1
    return remaining


def give_each_stream_a_workspace() -> None:
    """Let products on two streams run at the same time.

    Transformer Engine 2.11 has one cuBLAS workspace a device (cpp_extensions/gemm.py, get_cublas_workspace), which
    products on two streams would overwrite for each other. It has no option for this, so its function is replaced by
    one that also asks for the stream. Idempotent."""
    from transformer_engine.pytorch.cpp_extensions import gemm

    one_a_device = gemm.get_cublas_workspace
    if hasattr(one_a_device, "by_stream"):
        return
    allocate = one_a_device.__wrapped__  # without its cache

    @functools.cache
    def of_stream(device: int, ub: bool, grouped_gemm: bool, stream: int) -> Any:
        return allocate(device, ub, grouped_gemm)

    def get_cublas_workspace(device: int, ub: bool, grouped_gemm: bool) -> Any:
        stream = torch.cuda.current_stream(device).cuda_stream
        return of_stream(device, ub, grouped_gemm, stream)

    get_cublas_workspace.by_stream = True  # type: ignore[attr-defined]
    gemm.get_cublas_workspace = get_cublas_workspace


def local_name(name: str) -> str:
    """The name that a parameter of a `te` model has in a `local` one, and in every checkpoint."""
    for linear, norm in (
        ("self_attention.linear_qkv", "input_layernorm"),
        ("mlp.linear_fc1", "pre_mlp_layernorm"),
    ):
        name = re.sub(rf"\b{linear}((\.\w+)?)\.layer_norm_weight$", rf"{norm}\1.weight", name)
    return name
