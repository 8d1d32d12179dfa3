# SPDX-License-Identifier: Apache-2.0
"""Are two sets of weights the same? Tensor by tensor, byte by byte, and by the constants that they are computed with;
and two Hugging Face folders by their logits.

Either side of the comparison of tensors is a Hugging Face folder or a distributed checkpoint, which is compared under
its Hugging Face names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_eve.checkpoint.weights import weights_folder
from megatron_eve.config.model_lines import model_from_text
from megatron_eve.config.schema import ModelConfig
from megatron_eve.config.weights_model import differing_constants
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import COMPLETE, CONFIG

from .hf_config import read_hf_config
from .hf_folder import SafetensorsFolder
from .tensors import canonical_hf_names

QUESTION = "What is in the image? Describe it in one sentence."
TEXT_IDS = torch.arange(48)[None] * 29 % 61
"""[1, 48] ids that every vocabulary has."""
PROCESSOR = "preprocessor_config.json"
_VALUES = 2**22  # compared at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One tensor that is not the same on both sides."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorComparison:
    """Result of `compare_tensors`."""

    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]


def compare_tensors(first: Path, second: Path, *, allow_extra: bool = False) -> TensorComparison:
    """Compare names, shapes, dtypes and bytes, one tensor of each side in memory at a time. `allow_extra`: tensors that
    only `second` has are no difference (a language model against the EVE model that was made from it)."""
    a, b = open_weights(first), open_weights(second)
    a_names, b_names = canonical_hf_names(a), canonical_hf_names(b)
    differences = [
        Difference(name=name, reason=f"only in {first if name in a_names else second}")
        for name in sorted(a_names.keys() ^ b_names.keys())
        if not (allow_extra and name in b_names)
    ]
    num_bytes = 0
    common = [name for name in b_names if name in a_names]  # in the order of cheapest reading
    for name in common:
        num_bytes += a[a_names[name]].nbytes
        if reason := difference(a[a_names[name]], b[b_names[name]]):
            differences.append(Difference(name=name, reason=reason))
    return TensorComparison(
        num_tensors=len(common),
        num_bytes=num_bytes,
        differences=tuple(sorted(differences, key=lambda d: d.name)),
    )


def compare_constants(first: Path, second: Path) -> tuple[Difference, ...]:
    """Constants of the two models that differ and that no tensor's shape tells: the same bytes with another rotary base
    are another model. None where a folder of safetensors has no config.json."""
    a, b = _model_of(first), _model_of(second)
    if a is None or b is None:
        return ()
    return tuple(
        Difference(name=f"model.{name}", reason=f"{here} against {there}")
        for name, (here, there) in differing_constants(a, b).items()
        if name not in _TOLD_BY_SHAPES
    )


_TOLD_BY_SHAPES = {
    *("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "tie_word_embeddings"),
    *("patch_stride", "dense_stride", "patch_embed_dim"),
}
"""Compared as tensors; a language model has no patches to compare."""


def _model_of(folder: Path) -> ModelConfig | None:
    checkpoint = weights_folder(folder)
    if (checkpoint / COMPLETE).is_file():
        where = checkpoint / CONFIG
        return model_from_text(where.read_text(encoding="utf-8"), where=str(where))
    if (folder / "config.json").is_file():
        return read_hf_config(folder, patch_embed_dim=0).model
    return None


def open_weights(folder: Path) -> Mapping[str, Tensor]:
    """Hugging Face names and tensors of a folder of either kind; each tensor is read when it is asked for."""
    if (weights_folder(folder) / COMPLETE).is_file():
        from .megatron_folder import read_megatron
        from .megatron_to_hf import hf_view

        return hf_view(read_megatron(folder))
    return SafetensorsFolder(folder)


def difference(a: Tensor, b: Tensor) -> str | None:
    """Why two tensors are not the same bytes; None if they are."""
    if a.shape != b.shape:
        return f"shape {list(a.shape)} against {list(b.shape)}"
    if a.dtype != b.dtype:
        return f"dtype {a.dtype} against {b.dtype}"
    flat_a, flat_b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    if torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8)):
        return None
    pieces = [
        (int((x != y).sum()), (x.double() - y.double()).abs().max().item())
        for x, y in zip(flat_a.split(_VALUES), flat_b.split(_VALUES), strict=True)
    ]
    values, gap = sum(count for count, _ in pieces), max(gap for _, gap in pieces)
    return f"{values} of {a.numel()} values differ, by {gap:.3g} at most"


def logits_gap(first: Path, second: Path) -> float:
    """Largest difference of the logits of two folders, one model in memory at a time.

    On a fixed question about a fixed picture; on fixed token ids if one of the two is a plain language model. Columns
    that only one of them has (a padded vocabulary) are left out. An official folder, which brings neither modelling
    files nor a processor, is computed by ours, on the input of the other. Raises: CheckpointError if transformers
    cannot load one, or if tensors are missing."""
    kinds = {_field(folder, "model_type") for folder in (first, second)}
    processors = [folder for folder in (first, second) if (folder / PROCESSOR).is_file()]
    with_picture = kinds == {"eve-qwen2"} and bool(processors)
    a, b = (
        _logits(folder, _picture_question(folder if folder in processors else processors[0]))
        if with_picture
        else _logits(folder, {"input_ids": TEXT_IDS})
        for folder in (first, second)
    )
    if a.shape[0] != b.shape[0]:
        return float("inf")
    columns = min(a.shape[1], b.shape[1])
    return (a[:, :columns] - b[:, :columns]).abs().max().item()


@torch.no_grad()
def _logits(folder: Path, inputs: Mapping[str, Any]) -> Tensor:
    """[tokens, vocabulary]"""
    try:
        model, report = _load(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(
            f"{folder} cannot be loaded by transformers' Auto classes ({reason}); --logits compares folders that can, "
            "and official ones."
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:8])}.")
    logits: Tensor = model(**inputs).logits[0].float()
    return logits


def _load(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what its folder lacks."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    # A name that is no folder here would be looked for on the hub, and its code run.
    options["local_files_only"] = True
    if _field(folder, "model_type") == "eve-qwen2" and _field(folder, "auto_map") is None:
        from .hf.configuration_eve import EVEQwen2Config
        from .hf.modeling_eve import EVEQwen2ForCausalLM

        geometry = read_hf_config(folder, patch_embed_dim=0).model
        config = EVEQwen2Config.from_pretrained(
            folder, patch_stride=geometry.patch_stride, dense_stride=geometry.dense_stride
        )
        classes: Any = EVEQwen2ForCausalLM
        options["config"] = config
    else:
        classes = AutoModelForCausalLM
        options["trust_remote_code"] = True
    model, report = classes.from_pretrained(folder, **options)
    return model, report


def _field(folder: Path, name: str) -> Any:
    """From config.json; None if it is not there, or there is no file."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def _picture_question(folder: Path) -> Mapping[str, Any]:
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    rows, cols = np.mgrid[0:96, 0:128]
    picture = np.stack((rows * 2, cols * 2 - 1, (rows * cols) % 256), axis=-1).astype(np.uint8)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs: Mapping[str, Any] = processor(
        text=processor.prompt(QUESTION), images=Image.fromarray(picture)
    )
    return inputs
