# SPDX-License-Identifier: Apache-2.0
"""The product around a tiny model in any layout, inside gloo workers: configuration, packs, chunks, weights folders."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_eve.checkpoint.training_state import TrainingState
from megatron_eve.checkpoint.weights import load_weights
from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainableGroup
from megatron_eve.data.sample import Pack
from megatron_eve.model.build import build_model
from megatron_eve.model.eve_model import EveModel
from megatron_eve.parallel.groups import ParallelState, init_model_parallel
from megatron_eve.training.assemble import Prepare, build_training, build_wrapped_model
from tests.support.save_weights import save_weights
from tests.support.tiny import RawSample, layout, naive_pack, random_samples

TOKENS, ALIGN = 160, 8
EVERYTHING: tuple[TrainableGroup, ...] = ("patch_embedding", "vision", "text")


def run_config(model: ModelConfig, parallel: ParallelConfig, **changes: Any) -> RunConfig:
    """A complete configuration around a tiny model."""
    base = RECIPES["eve_tiny_stage3"]()
    config = dataclasses.replace(
        base,
        model=model,
        parallel=parallel,
        data=dataclasses.replace(
            base.data, pack_tokens=TOKENS, align=ALIGN, sample_align=2 * parallel.context
        ),
        train=dataclasses.replace(base.train, dtype="fp32", deterministic=False),
        stage=dataclasses.replace(base.stage, trainable=changes.pop("trainable", EVERYTHING)),
    )
    for section, fields in changes.items():
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **fields)}
        )
    return config


def global_batch(num_packs: int) -> list[list[RawSample]]:
    """The samples of each pack of a global batch."""
    return [random_samples(5, seed=10 + index) for index in range(num_packs)]


def packs_of_rank(
    packs: Sequence[Sequence[RawSample]], *, config: RunConfig, state: ParallelState
) -> list[Pack]:
    """The packs of the global batch that this data-parallel rank computes on; data order is that of the packs."""
    data, ends = config.data, list(itertools.accumulate(map(len, packs), initial=0))
    return [
        naive_pack(
            list(samples),
            model=config.model,
            tokens=data.pack_tokens,
            align=data.align,
            sample_align=data.sample_align,
            first_place=first_place,
            step_places=max(1, ends[-1]),
        )
        for samples, first_place in list(zip(packs, ends[:-1], strict=True))[
            state.dp_rank :: state.dp_size
        ]
    ]


def build(
    config: RunConfig,
    *,
    weights: str | None,
    state: ParallelState | None = None,
    in_float64: bool = False,
) -> tuple[Any, Any, ParallelState, Any]:
    """Bare chunks, wrapped chunks, state and megatron-core's config, with weights loaded.

    `state`: of groups that are there already, to use them again. `in_float64`: weights and activations; the gradient
    buffers, in which micro-batches are added up and reduced over ranks, stay float32."""
    state = state or init_model_parallel(config.parallel, seed=1)
    prepare = _prepare(weights, in_float64=in_float64)
    model = build_wrapped_model(config, state=state, prepare=prepare)
    return model.chunks, model.wrapped, state, model.core


def build_all(
    config: RunConfig, *, weights: str | None, state: ParallelState | None = None, steps: int = 10
) -> tuple[TrainingState, ParallelState]:
    """The same with optimizer and schedule, as the trainer assembles them."""
    state = state or init_model_parallel(config.parallel, seed=1)
    training = build_training(config, state=state, steps=steps, prepare=_prepare(weights))
    return training, state


def _prepare(weights: str | None, *, in_float64: bool = False) -> Prepare:
    def prepare(chunks: Sequence[EveModel]) -> None:
        if weights is not None:
            load_weights(chunks, weights, copy_text_to_vision=False)
        for chunk in chunks if in_float64 else ():
            chunk.double()

    return prepare


def without_sequence_parallel_all_reduce(model: Any, *args: Any, **kwargs: Any) -> None:
    """finalize_model_grads with one of its all-reduces missing."""
    from megatron.core.distributed import finalize_model_grads as module_function

    for chunk in model:
        for param in chunk.parameters():
            param.sequence_parallel = False
    module_function(model, *args, **kwargs)


def write_reference_weights(model: ModelConfig, out: str) -> None:
    """The reference model's weights, through the converter, as a weights folder."""
    from checkpoints_convert.tensors import hf_to_eve
    from tests.support.reference_eve import build_reference

    state = init_model_parallel(layout(), seed=1)
    chunks, _ = build_model(run_config(model, layout()), state=state)
    weights = hf_to_eve(build_reference(model).state_dict(), model)
    chunks[0].load_state_dict(weights, strict=False)
    save_weights(chunks, out, config_text="")


def read_weights(model: ModelConfig, folder: str) -> dict[str, Tensor]:
    """A weights folder as an unsharded state dict."""
    state = init_model_parallel(layout(), seed=1)
    chunks, _ = build_model(run_config(model, layout()), state=state)
    load_weights(chunks, folder, copy_text_to_vision=False)
    return {name: param.detach() for name, param in chunks[0].named_parameters()}
