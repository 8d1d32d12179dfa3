# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder -> a distributed checkpoint that any layout can load, one tensor at a time.

Reads plain language models (Qwen2, Qwen2.5, Llama-3, Vicuna; any size) and EVE models (ours and official). What a plain
language model lacks is made here: a freshly initialised patch embedding (convolutions as PyTorch's default, CLS and SPL
N(0, 1), as in the official code; seeded), with `split` vision weights as copies of the text weights (official
repeat_moe.py), and zeros for the biases of q, k and v where the decoder has none (Llama): the same function. Everything
else is moved byte for byte; another `dtype` rounds.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.data.read.vocabulary import stored_vocabulary
from megatron_eve.errors import CheckpointError

from .generation import not_applied, read_generation
from .hf_config import HfModel, read_hf_config
from .hf_folder import SafetensorsFolder
from .megatron_folder import TORCH_DTYPES, Dtype, write_megatron
from .model_text import model_text
from .names import tensor_rules, text_twin
from .tensors import ROTARY, EveView, canonical_hf_names

_PATCH_EMBEDDING = "patch_embedding."
_SPECIAL_TOKENS = ("class_embedding", "split_embedding")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """How to convert a Hugging Face folder."""

    dtype: Dtype | None  # None: as stored
    split: SplitConfig | None  # None: as config.json says (a plain language model: dense)
    vocab_size: int | None  # None: as config.json says; else rows are cut or zero rows added
    patch_embed_dim: int  # channels of a new patch embedding
    special_token_std: float  # of a new CLS and SPL
    seed: int
    overwrite: bool


class CompletedCheckpoint(Mapping[str, Tensor]):
    """A checkpoint, and what the target model has but a checkpoint of this kind cannot have.

    Reading stays lazy. A tensor that the checkpoint should have stays missing, so that it is reported."""

    def __init__(
        self,
        source: Mapping[str, Tensor],
        *,
        copies: Mapping[str, str],
        made: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        self._source, self._copies, self._made = source, copies, made

    def __getitem__(self, name: str) -> Tensor:
        name = self._copies.get(name, name)
        return self._made[name]() if name in self._made else self._source[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._source
        yield from self._copies
        yield from self._made

    def __len__(self) -> int:
        return len(self._source) + len(self._copies) + len(self._made)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportPlan:
    """A conversion after all its checks, before any weight is read."""

    found: HfModel
    model: ModelConfig  # what is written
    dtype: Dtype
    weights: SafetensorsFolder
    copies: Mapping[
        str, str
    ]  # Hugging Face name of a vision weight -> of the text weight it copies
    zeros: frozenset[str]  # Hugging Face names of text biases that the source's decoder lacks
    headers: Mapping[str, Tensor]  # shapes of EveModel's tensors (device "meta")
    resize_vocabulary: bool

    def tensors(self, *, new_patch_embedding: Mapping[str, Tensor]) -> EveView:
        """The values, by EveModel's names. A new patch embedding is given by its Hugging Face names."""
        made = {name: partial(_itself, tensor) for name, tensor in new_patch_embedding.items()}
        shapes = _hf_shapes(self.model)
        made |= {name: partial(torch.zeros, shapes[name]) for name in self.zeros}
        state = CompletedCheckpoint(self.weights, copies=self.copies, made=made)
        return EveView(state, self.model, resize_vocabulary=self.resize_vocabulary)


def plan_import(source: Path, options: ImportOptions) -> ImportPlan:
    """Run the whole conversion on shapes alone.

    Raises: CheckpointError as the conversion would, naming what does not fit."""
    found = read_hf_config(source, patch_embed_dim=options.patch_embed_dim)
    model = target_model(found.model, options)
    weights = SafetensorsFolder(source)
    shapes = _hf_shapes(model)
    copies = vision_copies(found.model, model)
    zeros: frozenset[str] = frozenset() if found.has_qkv_bias else _text_biases(model)
    new = zeros if found.is_eve else zeros | _patch_embedding_names(model)
    made = {name: partial(torch.empty, shapes[name], device="meta") for name in new}
    state = CompletedCheckpoint(weights.headers(), copies=copies, made=made)
    resize = options.vocab_size is not None
    return ImportPlan(
        found=found,
        model=model,
        dtype=options.dtype or stored_dtype(weights),
        weights=weights,
        copies=copies,
        zeros=zeros,
        headers=dict(EveView(state, model, resize_vocabulary=resize)),
        resize_vocabulary=resize,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """The result of an import."""

    model: ModelConfig
    dtype: Dtype
    num_tensors: int
    not_applied: tuple[str, ...] = ()  # of the source's generation settings, by a release


def import_hf(source: Path, dest: Path, options: ImportOptions) -> Imported:
    """Convert the folder `source` to the distributed checkpoint `dest`."""
    plan, generation = plan_import(source, options), read_generation(source)
    fresh = {} if plan.found.is_eve else new_patch_embedding(plan.model, plan.dtype, options)
    write_megatron(
        dest,
        plan.model,
        plan.tensors(new_patch_embedding=fresh),
        headers=plan.headers,
        dtype=plan.dtype,
        config_text=model_text(plan.model, origin=str(source.resolve()), generation=generation),
        vocabulary=stored_vocabulary(source),
        overwrite=options.overwrite,
    )
    return Imported(
        model=plan.model,
        dtype=plan.dtype,
        num_tensors=len(plan.headers),
        not_applied=tuple(not_applied(generation)),
    )


def planned_mapping(source: Path, options: ImportOptions) -> list[str]:
    """`NAME [shape] dtype -> EVEMODEL_NAME` for each tensor that is read or made, after all checks; for a dry run.

    What is made has `(new)` or `(zeros)` for a name; what is read only to be checked has its reason for a target."""
    plan = plan_import(source, options)
    headers = plan.weights.headers()
    stored_names, used = canonical_hf_names(headers), set()
    lines = []
    for rule in tensor_rules(plan.model):
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            origin = plan.copies.get(name, name)
            if origin in stored_names:
                what = described(stored_names[origin], headers)
                used.add(origin)
            else:
                what = f"({'zeros' if origin in plan.zeros else 'new'}) {list(shape)}"
            lines.append(f"{what} -> {rule.eve}")
    for name in sorted(stored_names.keys() - used):
        what = described(stored_names[name], headers)
        lines.append(f"{what} -> (compared with what the configuration gives)")
    return lines


def described(name: str, headers: Mapping[str, Tensor]) -> str:
    """A tensor in one line: name, shape, dtype."""
    header = headers[name]
    return f"{name} {list(header.shape)} {str(header.dtype).removeprefix('torch.')}"


def target_model(model: ModelConfig, options: ImportOptions) -> ModelConfig:
    """The model of config.json with the split and vocabulary asked for. A split can be added, never undone."""
    if options.vocab_size is not None:
        model = dataclasses.replace(model, vocab_size=options.vocab_size)
    if options.split is None:
        return model
    for part in ("norm", "attention", "ffn"):
        if getattr(model.split, part) and not getattr(options.split, part):
            raise CheckpointError(
                f"--split leaves out {part}, for which the checkpoint has separate vision weights; name every "
                "component that is split already."
            )
    return dataclasses.replace(model, split=options.split)


def vision_copies(found: ModelConfig, target: ModelConfig) -> dict[str, str]:
    """Vision weight -> text weight it copies, for the components that only the target splits."""
    before, after = (_hf_shapes(model).keys() for model in (found, target))
    twins = ((name, text_twin(name)) for name in sorted(after - before))
    return {name: twin for name, twin in twins if twin is not None}


def new_patch_embedding(
    model: ModelConfig, dtype: Dtype, options: ImportOptions
) -> dict[str, Tensor]:
    """A freshly drawn patch embedding under its Hugging Face names: the one that EveModel draws with this seed."""
    from megatron_eve.model.patch_embedding import PatchEmbedding

    config = SimpleNamespace(params_dtype=TORCH_DTYPES[dtype], sequence_parallel=False)
    drawn = PatchEmbedding(config, model=model, seed=options.seed).cpu().state_dict()
    for name in _SPECIAL_TOKENS:
        drawn[name].mul_(options.special_token_std)
    rules = {rule.eve: rule for rule in tensor_rules(model)}
    return {rules[_PATCH_EMBEDDING + name].hf[0]: tensor for name, tensor in drawn.items()}


def stored_dtype(weights: SafetensorsFolder) -> Dtype:
    """The dtype of all weights, if a checkpoint of ours can have it."""
    names: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    found = weights.dtype(but=ROTARY)
    if found not in names:
        raise CheckpointError(
            f"The checkpoint is {found}; choose --dtype bf16 or --dtype fp32 to convert it."
        )
    return names[found]


def _hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for rule in tensor_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }


def _text_biases(model: ModelConfig) -> frozenset[str]:
    """Biases of the text branch (or of a decoder that is not split) under their Hugging Face names."""
    names = (name for rule in tensor_rules(model) if rule.kind == "qkv" for name in rule.hf)
    return frozenset(n for n in names if n.endswith(".bias") and text_twin(n) is None)


def _patch_embedding_names(model: ModelConfig) -> frozenset[str]:
    rules = (rule for rule in tensor_rules(model) if rule.eve.startswith(_PATCH_EMBEDDING))
    return frozenset(name for rule in rules for name in rule.hf)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


__all__ = ["ImportOptions", "Imported", "import_hf", "planned_mapping"]
