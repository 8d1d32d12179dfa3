# SPDX-License-Identifier: Apache-2.0
"""Checks of the choices for a GPU: how FP8, the layout and the model's widths fit together.

Source: Transformer Engine 2.11 (utils.py: assert_dim_for_fp8_exec; tensor/float8_blockwise_tensor.py: is_quantizable)
and megatron-core 0.16.1 (transformer_config.py), whose own errors come only when the model is built on a GPU."""

from collections.abc import Iterator

from megatron_eve.config.decoder import decoder_layer
from megatron_eve.config.schema import ModelConfig, RunConfig

FP8_WIDTH = 16
"""Transformer Engine's FP8 kernels need both widths of a linear on a rank in multiples of this."""
FP8_BLOCK = 128
"""Edge of the blocks that have a scale of their own with gpu.fp8=block."""


def linear_widths(model: ModelConfig, *, tensor: int) -> dict[str, tuple[int, int]]:
    """(input, output) of each linear of a decoder layer on one of `tensor` ranks."""
    linears = decoder_layer(model).linears
    return {one.name.rpartition(".")[2]: one.on_rank(tensor) for one in linears}


def fp8_linears(model: ModelConfig, *, tensor: int, min_width: int) -> list[str]:
    """The linears that are wide enough for FP8 to pay (gpu.fp8_min_width)."""
    widths = linear_widths(model, tensor=tensor)
    return [name for name, pair in widths.items() if min(pair) >= min_width]


def gpu_problems(config: RunConfig) -> Iterator[str]:
    """One message per contradiction between section gpu and the rest."""
    gpu = config.gpu
    if gpu.fp8 != "none" and config.train.backend != "te":
        yield f"gpu.fp8={gpu.fp8} needs train.backend=te, found local; set one of the two."
    if gpu.fp8 == "none":
        if gpu.bf16_first_layers or gpu.bf16_last_layers:
            yield (
                f"gpu.bf16_first_layers={gpu.bf16_first_layers} and gpu.bf16_last_layers={gpu.bf16_last_layers} have "
                "no effect with gpu.fp8=none; set both to 0 or choose a gpu.fp8."
            )
        return
    yield from _fp8_problems(config)


def _fp8_problems(config: RunConfig) -> Iterator[str]:
    gpu, model, tensor = config.gpu, config.model, config.parallel.tensor
    unit = FP8_BLOCK if gpu.fp8 == "block" else FP8_WIDTH
    widths = linear_widths(model, tensor=tensor)
    chosen = fp8_linears(model, tensor=tensor, min_width=gpu.fp8_min_width)
    if not chosen:
        widest = max(min(pair) for pair in widths.values())
        yield (
            f"gpu.fp8={gpu.fp8} with gpu.fp8_min_width={gpu.fp8_min_width} leaves every linear in BF16: the widest on "
            f"a rank of parallel.tensor={tensor} has {widest}; use a smaller gpu.fp8_min_width or gpu.fp8=none."
        )
    for name in chosen:
        for width in widths[name]:
            if width % unit:
                yield (
                    f"gpu.fp8={gpu.fp8} needs widths in multiples of {unit}, but {name} has {width} on a rank of "
                    f"parallel.tensor={tensor}; raise gpu.fp8_min_width above {min(widths[name])} or change the layout."
                )
    ranks = tensor if config.parallel.sequence_parallel else 1
    if gpu.fp8 == "block" and config.data.align % (FP8_BLOCK * ranks):
        yield (
            f"data.align={config.data.align} is not a multiple of {FP8_BLOCK * ranks} = {FP8_BLOCK} rows x {ranks} "
            f"ranks that gpu.fp8=block needs; use {FP8_BLOCK * ranks}, or gpu.fp8=current."
        )
    yield from _bf16_layer_problems(config)


def _bf16_layer_problems(config: RunConfig) -> Iterator[str]:
    gpu, stage_layers = config.gpu, config.model.num_layers // config.parallel.pipeline
    first, last = gpu.bf16_first_layers, gpu.bf16_last_layers
    if not (first or last):
        return
    if gpu.fp8 == "delayed":
        yield (
            f"gpu.fp8=delayed needs gpu.bf16_first_layers=0 and gpu.bf16_last_layers=0, found {first} and {last}: its "
            "scales are exchanged once for all layers; use gpu.fp8=current or block."
        )
    for key, layers in (("gpu.bf16_first_layers", first), ("gpu.bf16_last_layers", last)):
        if layers > stage_layers:
            yield (
                f"{key}={layers} is above the {stage_layers} layers of a pipeline stage, all that megatron-core keeps "
                "in BF16; use at most as many."
            )
