# SPDX-License-Identifier: Apache-2.0
"""Expected time of a step: what a rank has to do (Amounts), over how fast it does it (Rates).

    micro-batch   products by size (FLOPs over a rate, and an overhead each) + attention + passes over memory
                  + collectives of the tensor- and context-parallel group, which nothing hides
    step          micro-batches x that / pipeline, + the bubble (p - 1) / (v m) of it, + what the backward does not hide
                  of the gradients' reduction and the weights' gathering, + optimizer + host

Passes over memory are counted in bytes per row: norms, residual sums, permutations, RoPE, SwiGLU, twice as many in the
backward; per micro-batch the addition of weight gradients into fp32 buffers; per step Adam on this rank's shard."""

import math
from dataclasses import dataclass, fields

from megatron_eve.config.decoder import decoder_layer
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import BYTES_PER_VALUE, memory_estimate

from .cluster import Cluster
from .gemms import attention_flops, gemms
from .mix import Mix, PackRows, pack_rows, samples_per_pack
from .rates import Rates

_FP32 = 4
_ADAM_BYTES = 30  # a parameter of the shard: gradient, two moments, main weight read, three written, weight written
_BACKWARD_PASSES = 2.0  # passes over memory in the backward, of those in the forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """The work of one rank, per micro-batch and as if it had all pipeline stages, unless said otherwise."""

    gemm_flops: float
    gemm_calls: float
    attention_flops: float
    memory_bytes: float
    layer_calls: float  # forward and backward of a layer
    tensor_bytes: float  # through this rank's links
    context_bytes: float
    pipeline_bytes: float  # per boundary of two stages
    forward_share: float  # of the micro-batch's work that is forward
    micro_batches: int  # a step
    reduce_bytes: float  # per step, of gradients
    gather_bytes: float  # per step, of weights
    optimizer_bytes: float  # per step


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step by part."""

    products: float
    attention: float
    memory: float
    tensor: float
    context: float
    pipeline: float  # bubble and transfers
    data: float  # what nothing hides
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def limit(self) -> str:
        """The largest part but the products, with its share of the step; products alone limit nothing."""
        parts = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "products"
        }
        name = max(parts, key=lambda part: parts[part])
        return f"{name} {100 * parts[name] / self.total:.0f}%"


def micro_batches(config: RunConfig, mix: Mix) -> int:
    """Of a data-parallel rank in a step; a rank without enough packs computes on empty ones. An interleaved schedule
    takes a multiple of the pipeline's length."""
    packs = float(config.batch.size)
    if config.batch.unit == "samples":
        packs = config.batch.size / samples_per_pack(config, mix)
    parallel = config.parallel
    unit = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    return max(1, math.ceil(packs / parallel.data / unit - 1e-9)) * unit


def amounts(config: RunConfig, mix: Mix, *, rows: PackRows | None = None) -> Amounts:
    """`rows`: of a measured pack; by default the mix's average pack."""
    rows = rows or pack_rows(config, mix)
    products = list(gemms(config, rows))
    forward, backward = attention_flops(config, rows)
    decoder = [one for one in products if one.component in ("qkv", "proj", "ffn")]
    full = config.train.recompute == "full"
    again = sum(one.product_flops * one.count for one in decoder) if full else 0
    attention_again = forward if config.train.recompute != "none" else 0
    forward_flops = sum(one.product_flops * one.count for one in products)
    all_flops = sum(one.product_flops * one.products for one in products) + again
    calls = sum(one.products for one in products) + full * sum(one.count for one in decoder)
    layers = config.model.num_layers
    passes = _forward_bytes(config, rows)
    held = memory_estimate(config)
    trained = held.gradients / _FP32
    value = BYTES_PER_VALUE[config.train.dtype]
    data = config.parallel.data * config.parallel.context
    ring = (data - 1) / data
    return Amounts(
        gemm_flops=all_flops,
        gemm_calls=calls,
        attention_flops=forward + backward + attention_again,
        memory_bytes=passes * (1 + _BACKWARD_PASSES + full)
        + config.parallel.pipeline * trained * (2 * value + 2 * _FP32),
        layer_calls=layers * (4 / 3 if full else 1),  # of a layer's three thirds one again
        tensor_bytes=_tensor_bytes(config, rows),
        context_bytes=_context_bytes(config, rows),
        pipeline_bytes=_pipeline_bytes(config, rows),
        forward_share=forward_flops / all_flops,
        micro_batches=micro_batches(config, mix),
        reduce_bytes=held.gradients * ring * (1 if config.parallel.distributed_optimizer else 2),
        gather_bytes=trained * value * ring * config.parallel.distributed_optimizer,
        optimizer_bytes=_ADAM_BYTES
        * trained
        / (data if config.parallel.distributed_optimizer else 1),
    )


def _forward_bytes(config: RunConfig, rows: PackRows) -> float:
    """Read and written by everything that is no product, forward, all layers."""
    model, parallel = config.model, config.parallel
    shards = parallel.tensor if parallel.sequence_parallel else 1
    count = rows.all / parallel.context
    layer = decoder_layer(model)
    heads, keys = layer.query_width / parallel.tensor, layer.key_width / parallel.tensor
    outside = 10 * model.hidden_size / shards  # two norms, two sums
    attention = 2 * (heads + 2 * keys) + 2 * (heads + keys) + 2 * heads  # there, RoPE, back
    width = 5 * layer.fc2.inputs / parallel.tensor  # silu, then its product with up
    value = BYTES_PER_VALUE[config.train.dtype]
    passes = count * (outside + attention + width) * value
    softmax = rows.labels / parallel.context * model.vocab_size / parallel.tensor * 3 * _FP32
    return model.num_layers * passes + softmax


def _tensor_bytes(config: RunConfig, rows: PackRows) -> float:
    """Sequence parallelism: gather and scatter around both blocks, forward and backward, and the inputs of trained
    linears once more. Without it an all-reduce, twice the bytes, in place of each pair."""
    model, parallel = config.model, config.parallel
    size = parallel.tensor
    if size == 1:
        return 0.0
    one = rows.all / parallel.context * model.hidden_size * BYTES_PER_VALUE[config.train.dtype]
    one *= (size - 1) / size
    full = config.train.recompute == "full"
    trained = any(group in config.stage.trainable for group in ("vision", "text"))
    collectives = 8 + 4 * full + (2 * trained if parallel.sequence_parallel else 0)
    return model.num_layers * collectives * one


def _context_bytes(config: RunConfig, rows: PackRows) -> float:
    """Keys and values of the other ranks, and their gradients back."""
    model, parallel = config.model, config.parallel
    if parallel.context == 1:
        return 0.0
    keys = 2 * decoder_layer(model).key_width / parallel.tensor
    one = rows.all / parallel.context * keys * BYTES_PER_VALUE[config.train.dtype]
    again = config.train.recompute != "none"
    return model.num_layers * (parallel.context - 1) * one * (3 + again)


def _pipeline_bytes(config: RunConfig, rows: PackRows) -> float:
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    shards = parallel.tensor if parallel.sequence_parallel else 1
    per_rank = rows.all / parallel.context / shards
    boundary = per_rank * config.model.hidden_size * BYTES_PER_VALUE[config.train.dtype]
    return 2 * boundary * parallel.virtual_pipeline


def step_time(config: RunConfig, done: Amounts, *, rates: Rates, cluster: Cluster) -> StepTime:
    """The model of this file's docstring. Ranks lie as megatron-core orders them: TP, CP, DP, PP."""
    parallel = config.parallel
    tensor_link = cluster.link(size=parallel.tensor, stride=1) * rates.link_share
    context_link = cluster.link(size=parallel.context, stride=parallel.tensor) * rates.link_share
    products = done.gemm_flops / rates.gemm_flops_per_s + done.gemm_calls * rates.gemm_overhead_s
    attention = done.attention_flops / rates.attention_flops_per_s
    passes = done.memory_bytes / rates.memory_bytes_per_s
    tensor, context = done.tensor_bytes / tensor_link, done.context_bytes / context_link
    host = done.layer_calls * rates.layer_overhead_s
    one = (products + attention + passes + tensor + context + host) / parallel.pipeline
    share = done.micro_batches / parallel.pipeline
    return StepTime(
        products=share * products,
        attention=share * attention,
        memory=share * passes,
        tensor=share * tensor,
        context=share * context,
        pipeline=_pipeline(config, done, one, rates=rates, cluster=cluster),
        data=_data(config, done, one, rates=rates, cluster=cluster),
        optimizer=done.optimizer_bytes / rates.optimizer_bytes_per_s,
        host=share * host + rates.step_overhead_s,
    )


def _pipeline(
    config: RunConfig, done: Amounts, one: float, *, rates: Rates, cluster: Cluster
) -> float:
    """`one`: seconds of a micro-batch on one stage."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return 0.0
    stride = parallel.world_size // parallel.pipeline
    link = cluster.link(size=parallel.pipeline, stride=stride) * rates.link_share
    bubble = (parallel.pipeline - 1) * one / parallel.virtual_pipeline
    return bubble + done.micro_batches * done.pipeline_bytes / link


def _data(config: RunConfig, done: Amounts, one: float, *, rates: Rates, cluster: Cluster) -> float:
    """Gradients are reduced during the last micro-batch's backward, weights gathered during the first's forward."""
    parallel = config.parallel
    size = parallel.data * parallel.context
    link = cluster.link(size=size, stride=parallel.tensor) * rates.link_share
    reduce, gather = done.reduce_bytes / link, done.gather_bytes / link
    if rates.compute_overlaps and parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - (1 - done.forward_share) * one)
    if rates.compute_overlaps and parallel.overlap_param_gather:
        gather = max(0.0, gather - done.forward_share * one)
    return reduce + gather
