# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints, read and written by one process through the model itself.

The tensors that this file hands out and takes are EveModel's unsharded state dict. Weights that a run saved in any
layout (tensor, pipeline, data parallel) are read into one whole model, which the format reshards by itself.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoints_convert.model_text import model_from_text, run_from_text
from megatron_eve.checkpoint.weights import (
    CONFIG,
    check_folder,
    load_weights,
    read_config_text,
    save_weights,
    weights_folder,
)
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.model.build import build_model
from megatron_eve.model.eve_model import EveModel
from megatron_eve.parallel.groups import init_distributed, init_model_parallel

Dtype = Literal["bf16", "fp32"]
TIMEOUT_S = 600

ONE_PROCESS = ParallelConfig(
    num_nodes=1,
    gpus_per_node=1,
    tensor=1,
    pipeline=1,
    virtual_pipeline=1,
    context=1,
    sequence_parallel=False,
    distributed_optimizer=False,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronWeights:
    """What a checkpoint folder holds, as one whole model."""

    model: ModelConfig
    run: RunConfig | None  # None: a converter wrote it
    dtype: Dtype
    tensors: dict[str, Tensor]  # EveModel's unsharded state dict


def write_megatron(
    folder: Path,
    model: ModelConfig,
    fill: Callable[[dict[str, Tensor]], Iterable[tuple[str, Tensor]]],
    *,
    dtype: Dtype,
    config_text: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Write a distributed checkpoint of a whole model.

    `fill` gets the freshly initialised (`seed`) tensors and yields the values of all of them, one at a time.
    """
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another name or pass --overwrite.")
    eve = _whole_model(model, dtype=dtype, seed=seed)
    tensors = _named_tensors(eve)
    untouched = set(tensors)
    with torch.no_grad():
        for name, value in fill(tensors):
            tensors[name].copy_(value)
            untouched.remove(name)
    assert not untouched, f"no value for {sorted(untouched)[0]}"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_weights([eve], partial, config_text=config_text)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_megatron(folder: Path) -> MegatronWeights:
    """Read the model weights of a checkpoint of a run (or of the newest one in its folder) or of a converter."""
    folder = weights_folder(folder)
    check_folder(folder)
    text = read_config_text(folder)
    model = model_from_text(text, where=str(folder / CONFIG))
    dtype = stored_dtype(folder)
    eve = _whole_model(model, dtype=dtype, seed=0)
    load_weights([eve], folder, copy_text_to_vision=False)
    return MegatronWeights(
        model=model, run=run_from_text(text), dtype=dtype, tensors=_named_tensors(eve)
    )


def stored_dtype(folder: Path) -> Dtype:
    """The dtype of the stored model weights."""
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    found = stored["final_layernorm.weight"].dtype
    names: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    if found not in names:
        raise CheckpointError(f"{folder} holds {found} weights, expected bfloat16 or float32.")
    return names[found]


def _whole_model(model: ModelConfig, *, dtype: Dtype, seed: int) -> EveModel:
    init_distributed(timeout_s=TIMEOUT_S)
    state = init_model_parallel(ONE_PROCESS, seed=seed)
    chunks, _ = build_model(model, parallel=ONE_PROCESS, state=state, dtype=dtype, seed=seed)
    return chunks[0]


def _named_tensors(eve: EveModel) -> dict[str, Tensor]:
    """The model's tensors themselves (not copies) by name."""
    return {
        name: tensor
        for name, tensor in eve.state_dict().items()
        if not name.endswith("_extra_state")
    }
