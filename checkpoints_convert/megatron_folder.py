# SPDX-License-Identifier: Apache-2.0
"""Distributed checkpoints, read and written by one process, one tensor at a time and without building the model.

The tensors that this file hands out and takes are EveModel's unsharded state dict. Weights that a run saved in any
layout (tensor, pipeline, context, data parallel) are put together tensor by tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eve.checkpoint.canonical import TensorHash, hash_of_boxes
from megatron_eve.checkpoint.manifest import (
    Manifest,
    check_bytes,
    check_folder,
    file_entry,
    read_manifest,
    write_manifest,
)
from megatron_eve.checkpoint.weights import read_config_text, weights_folder
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.data.read.vocabulary import FACT
from megatron_eve.errors import CheckpointError
from megatron_eve.finite import check_finite, is_finite
from megatron_eve.parallel.groups import init_distributed
from megatron_eve.run_files import CONFIG
from megatron_eve.whole import write_text

from .disk import WriteBack
from .model_text import model_from_text, run_from_text
from .names import tensor_rules
from .new_folder import new_folder
from .tensors import EveView
from .torch_dist import SHARD_SUFFIX, Chunk, StoredTensors, write_tensors

Dtype = Literal["bf16", "fp32"]
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronWeights:
    """The weights in a checkpoint folder. No tensor is read before it is asked for."""

    folder: Path
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
    vocabulary: Mapping[str, Any] | None,
    overwrite: bool,
) -> None:
    """Write a distributed checkpoint of a whole model, published when it is whole.

    `headers`: shapes of all tensors (device "meta"); `tensors`: their values, rounded to `dtype` where they differ.
    `vocabulary`: of the tokenizer beside the source, if there is one.
    """
    # Not at the top: megatron_eve redirects CUDA before megatron.core is imported.
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    with new_folder(folder, overwrite=overwrite) as partial:
        init_distributed(timeout_s=TIMEOUT_S)
        TorchCommonSaveStrategy("torch", 1).save_common({}, partial)
        write_tensors(
            partial,
            {name: header.to(TORCH_DTYPES[dtype]) for name, header in headers.items()},
            _chunks(tensors, model, TORCH_DTYPES[dtype]),
            num_layers=model.num_layers,
        )
        save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        facts = {"kind": "weights"} | ({} if vocabulary is None else {FACT: dict(vocabulary)})
        _complete(partial, config_text=config_text, facts=facts)


def _complete(folder: Path, *, config_text: str, facts: Mapping[str, Any]) -> None:
    """Bytes are hashed, tensors are not: `verify` compares a converter's result with its source."""
    write_text(folder / CONFIG, config_text)
    with WriteBack() as disk:
        paths = sorted(folder.iterdir())
        for path in paths:
            disk.sync(path)
        files = {path.name: file_entry(path) for path in paths}
    write_manifest(folder, Manifest(facts=facts, files=files))


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
    """Reads a tensor, or one of the Hugging Face tensors that make it up, and refuses values that are not finite."""

    tensors: EveView
    name: str
    dtype: torch.dtype
    number: int | None

    def __call__(self) -> Tensor:
        if self.number is not None:
            value = self.tensors.parts(self.name)[self.number].to(self.dtype)
        else:
            value = self.tensors[self.name].to(self.dtype)
        if not is_finite(value):
            self._name_the_part()
            check_finite(self.name, value, source=f"as {self.dtype}")  # what rounding made infinite
        return value

    def _name_the_part(self) -> None:
        """Raises: CheckpointError with the tensor's name in the Hugging Face folder, if its own values are at fault."""
        names = self.tensors.hf_names(self.name)
        for name, part in zip(names, self.tensors.parts(self.name), strict=True):
            check_finite(name, part, source="the Hugging Face folder")


def read_megatron(folder: Path) -> MegatronWeights:
    """The model weights of a checkpoint of a run (or of the newest one in its folder) or of a converter. Of its bytes
    only the number is checked here: see refuse_damaged.

    Raises: CheckpointError if the folder is incomplete or the dtype none of ours."""
    folder = weights_folder(folder)
    check_folder(folder)
    text = read_config_text(folder)
    model = model_from_text(text, where=str(folder / CONFIG))
    tensors = StoredTensors(folder, vocab_size=model.vocab_size)
    return MegatronWeights(
        folder=folder,
        model=model,
        run=run_from_text(text),
        dtype=_dtype(tensors.headers, folder),
        tensors=tensors,
    )


def refuse_damaged(weights: MegatronWeights) -> None:
    """Compare the weights with what the run had in memory when it saved them: their canonical hashes, computed from the
    tensors as they are put together here. A converter's folder has no such hashes: its files' are compared.

    Raises: CheckpointError naming the damaged file or tensor."""
    folder, manifest = weights.folder, read_manifest(weights.folder)
    if not manifest.tensors:
        check_bytes(folder, manifest.files, manifest)
        return
    small = [name for name in manifest.files if not name.endswith(SHARD_SUFFIX)]
    check_bytes(folder, small, manifest)  # the model's configuration, the index
    for name, expected in manifest.tensors.items():
        if name.startswith("optimizer."):
            continue
        found = canonical_hash(weights.tensors, name, expected.shape)
        if found != expected:
            raise CheckpointError(
                f"{folder}: {name} is not what was saved; use another checkpoint of the run"
            )


def canonical_hash(tensors: StoredTensors, name: str, shape: tuple[int, ...]) -> TensorHash | None:
    """The hash of a canonical tensor, whose layers are stacked; None if a part is missing or has another shape."""
    parts = tensors.parts_of(name)
    headers = [tensors.headers.get(part) for part in parts]
    is_stacked = parts != [name]
    own = shape[1:] if is_stacked else shape
    if not parts or any(header is None or tuple(header.shape) != own for header in headers):
        return None
    rest = (0,) * len(own)
    boxes = (
        ((layer, *rest), tensors[part][None]) if is_stacked else (rest, tensors[part])
        for layer, part in enumerate(parts)
    )
    assert headers[0] is not None
    return hash_of_boxes(boxes, whole=shape, dtype=headers[0].dtype)


def _dtype(headers: Mapping[str, Tensor], folder: Path) -> Dtype:
    found = {header.dtype: name for name, header in headers.items()}
    for dtype, torch_dtype in TORCH_DTYPES.items():
        if set(found) == {torch_dtype}:
            return dtype
    listing = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
    raise CheckpointError(
        f"{folder} holds {listing or 'no weights'}, expected one of bfloat16 and float32 throughout."
    )
