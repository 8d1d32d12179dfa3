# SPDX-License-Identifier: Apache-2.0
"""Matrix products of one micro-batch on one rank, with their sizes: a rate depends on them, a sum of FLOPs does not.

Their sum over ranks is what metrics/flops.py counts as executed (tests/tools/test_plan_time.py compares)."""

from collections.abc import Iterator
from dataclasses import dataclass

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
    """Of all layers, as if this rank had every pipeline stage; attention is not among them."""
    model, cp = config.model, config.parallel.context
    every = {"vision": rows.vision // cp, "text": rows.text // cp}
    few = {"vision": rows.kept_vision // cp, "text": rows.kept_text // cp}
    yield from _patch_embedding(config, rows)
    for name, inner, outer, last in _decoder(config):
        split = model.split.ffn if name == "ffn" else model.split.attention
        for modality in ("vision", "text"):
            group = modality if split else "text"
            for count, number in ((model.num_layers - 1, every), (1, few if last else every)):
                yield Gemm(
                    component=name,
                    rows=number[modality],
                    inner=inner,
                    outer=outer,
                    count=count,
                    input_gradient=True,  # the residual stream requires one in every stage
                    weight_gradient=group in config.stage.trainable,
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


def _decoder(config: RunConfig) -> Iterator[tuple[str, int, int, bool]]:
    """(component, inner, outer, whether the last layer computes the kept rows only) of each linear."""
    model, tensor = config.model, config.parallel.tensor
    heads = model.num_attention_heads * model.head_dim // tensor
    keys = model.num_kv_heads * model.head_dim // tensor
    width = model.ffn_hidden_size // tensor
    yield "qkv", model.hidden_size, heads + 2 * keys, False
    yield "proj", heads, model.hidden_size, True
    yield "ffn", model.hidden_size, 2 * width, True
    yield "ffn", width, model.hidden_size, True


def _patch_embedding(config: RunConfig, rows: PackRows) -> Iterator[Gemm]:
    """Each sequence-parallel rank embeds its own rows; without sequence parallelism every rank all of them."""
    model, parallel = config.model, config.parallel
    shards = parallel.tensor if parallel.sequence_parallel else 1
    patches = rows.patches // parallel.context // shards
    windows, trained = model.dense_stride**2, "patch_embedding" in config.stage.trainable
    for count, inner, outer, gradient in (
        (patches * windows, 3 * model.patch_stride**2, model.patch_embed_dim, False),
        (patches, model.patch_embed_dim * windows, model.hidden_size, trained),
    ):
        yield Gemm(
            component="patch_embedding",
            rows=count,
            inner=inner,
            outer=outer,
            count=1,
            input_gradient=gradient,
            weight_gradient=trained,
        )


def attention_flops(config: RunConfig, rows: PackRows) -> tuple[int, int]:
    """(forward, backward) of all layers on one rank; the backward computes the scores again."""
    model, parallel = config.model, config.parallel
    heads = model.num_attention_heads * model.head_dim // parallel.tensor
    product = 2 * heads * rows.pairs // parallel.context * model.num_layers
    return 2 * product, 5 * product
