# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints, read and written by one process, one tensor at a time and without building the model.

The tensors that this file hands out and takes are EveModel's unsharded state dict. Weights that a run saved in any
layout (tensor, pipeline, context, data parallel) are put together tensor by tensor.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from checkpoints_convert.model_text import model_from_text, run_from_text
from checkpoints_convert.names import tensor_rules
from checkpoints_convert.tensors import EveView
from checkpoints_convert.torch_dist import Chunk, StoredTensors, write_tensors
from megatron_eve.checkpoint.manifest import (
    CONFIG,
    Manifest,
    check_folder,
    file_entry,
    sync_folder,
    write_atomically,
    write_manifest,
)
from megatron_eve.checkpoint.weights import read_config_text, weights_folder
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.parallel.groups import init_distributed

Dtype = Literal["bf16", "fp32"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronWeights:
    """What a checkpoint folder holds. No tensor is read before it is asked for."""

    model: ModelConfig
    run: RunConfig | None  # None: a converter wrote it
    dtype: Dtype
    tensors: StoredTensors  # EveModel's unsharded state dict


def write_megatron(
    folder: Path,
    model: ModelConfig,
    tensors: EveView,
    *,
    headers: Mapping[str, Tensor],
    dtype: Dtype,
    config_text: str,
    overwrite: bool,
) -> None:
    """Write a distributed checkpoint of a whole model, published when it is whole.

    `headers`: shapes of all tensors (device "meta"); `tensors`: their values, rounded to `dtype` where they differ.
    """
    # Not at the top: megatron_eve redirects CUDA before megatron.core is imported.
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another name or pass --overwrite.")
    init_distributed(timeout_s=TIMEOUT_S)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    TorchCommonSaveStrategy("torch", 1).save_common({}, partial)
    write_tensors(
        partial,
        {name: header.to(TORCH_DTYPES[dtype]) for name, header in headers.items()},
        _chunks(tensors, model, TORCH_DTYPES[dtype]),
        num_layers=model.num_layers,
    )
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    _complete(partial, config_text=config_text)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _complete(folder: Path, *, config_text: str) -> None:
    """Bytes are hashed, tensors are not: what a converter writes is compared with its source by `verify`."""
    write_atomically(folder / CONFIG, config_text)
    files = {path.name: file_entry(path) for path in sorted(folder.iterdir())}
    write_manifest(folder, Manifest(facts={"kind": "weights"}, files=files))
    sync_folder(folder)


def _chunks(tensors: EveView, model: ModelConfig, dtype: torch.dtype) -> list[Chunk]:
    """One chunk a tensor, but gate and up apart, as megatron-core writes them: they need not be joined."""
    chunks = []
    for rule in tensor_rules(model):
        first, parts = 0, rule.hf_shapes if rule.kind == "gate_up" else ()
        for number, shape in enumerate(parts):
            rows = (first, first + shape[0])
            chunks.append(
                Chunk(name=rule.eve, rows=rows, read=_Part(tensors, rule.eve, dtype, number))
            )
            first = rows[1]
        if not parts:
            rows = (0, sum(shape[0] for shape in rule.hf_shapes))
            chunks.append(
                Chunk(name=rule.eve, rows=rows, read=_Part(tensors, rule.eve, dtype, None))
            )
    return chunks


@dataclass(frozen=True, slots=True)
class _Part:
    """Reads a tensor, or one of the Hugging Face tensors that make it up."""

    tensors: EveView
    name: str
    dtype: torch.dtype
    number: int | None

    def __call__(self) -> Tensor:
        if self.number is None:
            return self.tensors[self.name].to(self.dtype)
        return self.tensors.parts(self.name)[self.number].to(self.dtype)


def read_megatron(folder: Path) -> MegatronWeights:
    """The model weights of a checkpoint of a run (or of the newest one in its folder) or of a converter.

    Raises: CheckpointError if the folder is incomplete or the dtype none of ours."""
    folder = weights_folder(folder)
    check_folder(folder)
    text = read_config_text(folder)
    model = model_from_text(text, where=str(folder / CONFIG))
    tensors = StoredTensors(folder, vocab_size=model.vocab_size)
    return MegatronWeights(
        model=model,
        run=run_from_text(text),
        dtype=_dtype(tensors.headers, folder),
        tensors=tensors,
    )


def _dtype(headers: Mapping[str, Tensor], folder: Path) -> Dtype:
    found = {header.dtype: name for name, header in headers.items()}
    for dtype, torch_dtype in TORCH_DTYPES.items():
        if set(found) == {torch_dtype}:
            return dtype
    listing = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
    raise CheckpointError(
        f"{folder} holds {listing or 'no weights'}, expected one of bfloat16 and float32 throughout."
    )
