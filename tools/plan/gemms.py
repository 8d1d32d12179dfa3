# SPDX-License-Identifier: Apache-2.0
"""Matrix products of one micro-batch on one rank, with their sizes: a rate depends on them, a sum of FLOPs does not.

Their sum over ranks is what metrics/flops.py counts as executed (tests/tools/test_plan_time.py compares)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_eve.config.decoder import MODALITIES, decoder_layer, patch_convolutions
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import padded_vocab_size

from .mix import PackRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """[rows, inner] x [inner, outer] on this rank, `count` times in a micro-batch, with the gradients it has."""

    component: str
    rows: int
    inner: int
    outer: int
    count: int
    input_gradient: bool
    weight_gradient: bool

    @property
    def product_flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer

    @property
    def products(self) -> int:
        """Forward and gradients."""
        return self.count * (1 + self.input_gradient + self.weight_gradient)


def gemms(config: RunConfig, rows: PackRows) -> Iterator[Gemm]:
    """Products of all layers, as if this rank had every pipeline stage; attention is not among them."""
    model, cp = config.model, config.parallel.context
    every = {"vision": rows.vision // cp, "text": rows.text // cp}
    few = {"vision": rows.kept_vision // cp, "text": rows.kept_text // cp}
    yield from _patch_embedding(config, rows)
    for linear in decoder_layer(model).linears:
        inner, outer = linear.on_rank(config.parallel.tensor)
        last = few if linear.kept_rows_only else every
        for modality in MODALITIES:
            for count, number in ((model.num_layers - 1, every), (1, last)):
                yield Gemm(
                    component=linear.component,
                    rows=number[modality],
                    inner=inner,
                    outer=outer,
                    count=count,
                    input_gradient=True,  # the residual stream requires one in every stage
                    weight_gradient=linear.group(modality, model.split) in config.stage.trainable,
                )
    tensor = config.parallel.tensor
    yield Gemm(
        component="output",
        rows=rows.labels // cp,
        inner=model.hidden_size,
        outer=padded_vocab_size(model, tensor=tensor) // tensor,
        count=1,
        input_gradient=True,
        weight_gradient="text" in config.stage.trainable,
    )


def _patch_embedding(config: RunConfig, rows: PackRows) -> Iterator[Gemm]:
    """Each sequence-parallel rank embeds its own rows; without sequence parallelism every rank all of them."""
    parallel = config.parallel
    shards = parallel.tensor if parallel.sequence_parallel else 1
    patches = rows.patches // parallel.context // shards
    trained = "patch_embedding" in config.stage.trainable
    for number, convolution in enumerate(patch_convolutions(config.model)):
        yield Gemm(
            component="patch_embedding",
            rows=patches * convolution.windows,
            inner=math.prod(convolution.inputs),
            outer=convolution.outputs,
            count=1,
            input_gradient=trained and number > 0,  # nobody needs the gradient of pixels
            weight_gradient=trained,
        )


def attention_flops(config: RunConfig, rows: PackRows) -> tuple[int, int]:
    """(forward, backward) of all layers on one rank; the backward computes the scores again."""
    model, parallel = config.model, config.parallel
    heads = decoder_layer(model).query_width // parallel.tensor
    product = 2 * heads * rows.pairs // parallel.context * model.num_layers
    return 2 * product, 5 * product
