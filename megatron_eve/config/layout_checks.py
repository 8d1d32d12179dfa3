# SPDX-License-Identifier: Apache-2.0
"""Checks of how the model and the batch fit the parallel layout. Every field is in its own range already.

Source: megatron-core 0.16.1 (model_parallel_config.py, schedules.py) and validate_args of Megatron-LM's training
package, whose checks the wheel does not carry."""

import shlex
from collections.abc import Iterator, Sequence

from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.errors import ParallelError


def layout_problems(config: RunConfig) -> Iterator[str]:
    """One message per contradiction in the model's shape or between it, the batch and the processes."""
    yield from _model_problems(config.model)
    yield from _tensor_problems(config)
    yield from _pipeline_problems(config)
    yield from _context_problems(config)
    yield from _process_problems(config)
    yield from _optimizer_problems(config)


def refuse_other_process_count(
    parallel: ParallelConfig, *, running: int, arguments: Sequence[str] | None = None
) -> None:
    """`running`: processes that were started. `arguments`: of the trainer, if the message is to have its torchrun line.

    Raises: ParallelError if their number is not the layout's."""
    if running == parallel.world_size:
        return
    text = (
        f"{running} processes are running but parallel.num_nodes={parallel.num_nodes} x "
        f"parallel.gpus_per_node={parallel.gpus_per_node} is {parallel.world_size}; "
        "start that many or change these two fields"
    )
    if arguments is not None:
        nodes = f"--nnodes {parallel.num_nodes} --node-rank N --master-addr FIRST_NODE "
        text += (
            f":\n  torchrun {nodes if parallel.num_nodes > 1 else ''}--nproc-per-node "
            f"{parallel.gpus_per_node} -m megatron_eve.train {shlex.join(arguments)}"
        )
    raise ParallelError(text, is_final=True)


def divisors(*numbers: int) -> list[int]:
    """Every number that divides all of `numbers`, ascending."""
    return [n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)]


def _model_problems(model: ModelConfig) -> Iterator[str]:
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % kv_heads:
        yield (
            f"model.num_kv_heads={kv_heads} does not divide model.num_attention_heads={heads}; "
            f"use {_one_of(divisors(heads))}."
        )
    if model.head_dim % 2:
        yield (
            f"model.head_dim={model.head_dim} is odd; rotary positions turn pairs of dimensions, "
            "so use an even number."
        )


def _tensor_problems(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    allowed = divisors(
        model.num_attention_heads, model.num_kv_heads, model.ffn_hidden_size, model.hidden_size
    )
    divided = (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_kv_heads", model.num_kv_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
        ("model.hidden_size", model.hidden_size),
    )
    for key, value in divided:
        if value % tensor:
            yield f"parallel.tensor={tensor} does not divide {key}={value}; use {_one_of(allowed)}."
    if config.parallel.sequence_parallel and tensor == 1:
        yield (
            "parallel.sequence_parallel=true needs parallel.tensor above 1, found 1; set "
            "parallel.sequence_parallel=false or a larger parallel.tensor."
        )


def _pipeline_problems(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={virtual} needs parallel.pipeline above 1, found 1; set "
            "parallel.virtual_pipeline=1 or a larger parallel.pipeline."
        )
    if layers % (pipeline * virtual):
        yield (
            f"parallel.pipeline={pipeline} x parallel.virtual_pipeline={virtual} = "
            f"{pipeline * virtual} does not divide model.num_layers={layers}; use a product of "
            f"{_one_of(divisors(layers))}."
        )


def _context_problems(config: RunConfig) -> Iterator[str]:
    """A sample is cut into 2 * context chunks of one size, a pack into `context` parts of whole aligned blocks."""
    context, data = config.parallel.context, config.data
    if context == 1:
        return
    if data.sample_align % (2 * context):
        yield (
            f"data.sample_align={data.sample_align} is not a multiple of {2 * context} = 2 x parallel.context="
            f"{context}, but each sample is cut into that many chunks; use "
            f"{-(-data.sample_align // (2 * context)) * 2 * context}, for example."
        )
    if data.align % (2 * context):
        yield (
            f"data.align={data.align} is not a multiple of {2 * context} = 2 x parallel.context={context}, but padding "
            "is cut over the context ranks like a sample; use "
            f"{-(-data.align // (2 * context)) * 2 * context}, for example."
        )
    if data.pack_tokens % (context * data.align):
        block = context * data.align
        yield (
            f"data.pack_tokens={data.pack_tokens} is not a multiple of {block} = parallel.context={context} x "
            f"data.align={data.align}; use {-(-data.pack_tokens // block) * block}, for example."
        )


def _process_problems(config: RunConfig) -> Iterator[str]:
    parallel, batch = config.parallel, config.batch
    world = parallel.world_size
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        yield (
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} = "
            f"{model_ranks} does not divide the {world} processes of parallel.num_nodes="
            f"{parallel.num_nodes} x parallel.gpus_per_node={parallel.gpus_per_node}; use a product "
            f"of {_one_of(divisors(world))}, or other numbers of nodes and processes."
        )
        return
    if batch.size < parallel.data:
        yield (
            f"batch.size={batch.size} {batch.unit} cannot feed {parallel.data} data-parallel ranks; "
            f"use {parallel.data} or more, or fewer processes."
        )
    elif batch.unit == "packs" and batch.size % parallel.data:
        nearest = -(-batch.size // parallel.data) * parallel.data
        yield (
            f"batch.size={batch.size} packs is not a multiple of the {parallel.data} data-parallel "
            f"ranks; use {nearest}, for example."
        )
    else:
        yield from _interleaving_problems(config)


def _interleaving_problems(config: RunConfig) -> Iterator[str]:
    """An interleaved schedule needs whole groups of `pipeline` micro-batches (packs) on every rank, every step."""
    parallel, batch = config.parallel, config.batch
    if parallel.virtual_pipeline == 1:
        return
    block = parallel.pipeline * parallel.data
    if batch.unit == "samples":
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs batch.unit=packs, found "
            "samples: packs of a step must be a multiple of the pipeline size, and the packs that "
            "a number of samples fills vary; use batch.unit=packs or parallel.virtual_pipeline=1."
        )
    elif batch.size % block:
        yield (
            f"batch.size={batch.size} packs is not a multiple of {block} = {parallel.pipeline} "
            f"pipeline stages x {parallel.data} data-parallel ranks, which interleaved stages need; "
            f"use {-(-batch.size // block) * block}, for example."
        )


def _optimizer_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.overlap_param_gather:
        return
    if not parallel.distributed_optimizer:
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true, found "
            "false; only a distributed optimizer gathers parameters."
        )
    if not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true, found "
            "false; megatron-core overlaps both or only the gradients."
        )


def _one_of(numbers: list[int]) -> str:
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
