# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the model chunks of this process."""

import logging

from megatron.core.transformer import TransformerConfig

from megatron_eve.config.megatron import transformer_config
from megatron_eve.config.schema import RunConfig
from megatron_eve.model import te
from megatron_eve.model.eve_model import EveModel
from megatron_eve.model.layer_specs import backend as backend_named
from megatron_eve.parallel.groups import ParallelState


def build_model(
    config: RunConfig, *, state: ParallelState
) -> tuple[list[EveModel], TransformerConfig]:
    """The chunks of this pipeline stage (one unless interleaved), freshly initialised, and megatron-core's config."""
    parallel, train, gpu = config.parallel, config.train, config.gpu
    core = transformer_config(
        config.model,
        parallel=parallel,
        dtype=train.dtype,
        recompute=train.recompute,
        deterministic=train.deterministic,
        gpu=gpu,
    )
    chunks = []
    _silence_unknown_mlp_warning()
    for chunk in range(parallel.virtual_pipeline):
        first = state.is_first_stage and chunk == 0
        last = state.is_last_stage and chunk == parallel.virtual_pipeline - 1
        chunks.append(
            EveModel(
                core,
                model=config.model,
                backend=backend_named(train.backend, gpu=gpu),
                pre_process=first,
                post_process=last,
                groups=state.groups,
                vp_stage=chunk if parallel.virtual_pipeline > 1 else None,
                seed=train.seed,
            )
        )
    for built in chunks:
        built.to(state.device)
    if gpu.fp8 != "none":
        te.keep_narrow_linears_in_bf16(chunks, min_width=gpu.fp8_min_width)
    return chunks, core


def _silence_unknown_mlp_warning() -> None:
    # TransformerLayer warns, once per layer, that it does not know our MLP class and builds it with default arguments,
    # which is what it is made for.
    name = "megatron.core.transformer.transformer_layer"
    logging.getLogger(name).setLevel(logging.ERROR)
