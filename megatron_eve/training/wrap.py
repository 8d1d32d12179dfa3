# SPDX-License-Identifier: Apache-2.0
"""From bare model chunks to what the schedules and the optimizer work on: low precision, then data parallelism."""

from collections.abc import Callable, Sequence

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_eve.config.megatron import ddp_config
from megatron_eve.config.schema import ParallelConfig
from megatron_eve.model.eve_model import EveModel
from megatron_eve.parallel.groups import ParallelState


def wrap_for_training(
    chunks: Sequence[EveModel],
    *,
    config: TransformerConfig,
    parallel: ParallelConfig,
    state: ParallelState,
) -> list[DistributedDataParallel]:
    """Wrap chunks whose weights are frozen already (gradient buffers hold trainable parameters only).

    Also completes `config` with the callbacks that megatron-core's schedules look up in it."""
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(
                config,
                ddp_config(parallel),
                module,
                disable_bucketing=index > 0,  # later chunks' communication is hidden anyway
                pg_collection=state.groups,
            )
        )
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        if len(wrapped) > 1:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if parallel.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Callable[..., object]]) -> object:
    return functions[0] if len(functions) == 1 else functions
