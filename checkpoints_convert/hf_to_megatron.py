# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder -> a distributed checkpoint that any layout can load.

Reads plain Qwen2 and Qwen2.5 language models of any size, and EVE models (ours and official). What a plain language
model lacks is made here: a freshly initialised patch embedding (convolutions as PyTorch's default, CLS and SPL
N(0, 1), as in the official code; seeded), and, with `split`, vision weights as copies of the text weights (official
repeat_moe.py). Everything else is moved byte for byte; another `dtype` rounds.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints_convert.hf_config import HfModel, read_hf_config
from checkpoints_convert.hf_folder import SafetensorsFolder
from checkpoints_convert.megatron_folder import Dtype, write_megatron
from checkpoints_convert.model_text import model_text
from checkpoints_convert.names import tensor_rules, text_twin
from checkpoints_convert.tensors import iter_eve
from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.errors import CheckpointError

_PATCH_EMBEDDING = "patch_embedding."
_DRAWN = (f"{_PATCH_EMBEDDING}class_embedding", f"{_PATCH_EMBEDDING}split_embedding")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """How a Hugging Face folder is converted."""

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
        found: HfModel,
        target: ModelConfig,
        *,
        fresh: Mapping[str, Tensor],
    ) -> None:
        self._source = source
        self._twin_of = vision_copies(found.model, target)
        self._new = {} if found.kind == "eve-qwen2" else new_patch_embedding(target, fresh)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._new:
            return self._new[name]
        return self._source[self._twin_of.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        yield from self._source
        yield from self._twin_of
        yield from self._new

    def __len__(self) -> int:
        return len(self._source) + len(self._twin_of) + len(self._new)


def vision_copies(found: ModelConfig, target: ModelConfig) -> dict[str, str]:
    """Vision weight -> text weight it copies, for the components that only the target splits."""
    before, after = (
        {name for rule in tensor_rules(model) for name in rule.hf} for model in (found, target)
    )
    twins = ((name, text_twin(name)) for name in sorted(after - before))
    return {name: twin for name, twin in twins if twin is not None}


def new_patch_embedding(model: ModelConfig, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The freshly initialised patch embedding under its Hugging Face names."""
    return {
        rule.hf[0]: fresh[rule.eve]
        for rule in tensor_rules(model)
        if rule.eve.startswith(_PATCH_EMBEDDING)
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What was written."""

    model: ModelConfig
    dtype: Dtype
    num_tensors: int


def import_hf(source: Path, dest: Path, options: ImportOptions) -> Imported:
    """Convert the folder `source` to the distributed checkpoint `dest`."""
    found = read_hf_config(source, patch_embed_dim=options.patch_embed_dim)
    model = target_model(found.model, options)
    weights = SafetensorsFolder(source)
    dtype = options.dtype or stored_dtype(weights)
    num_tensors = len(check_source(weights, found, model, options))

    def fill(fresh: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        with torch.no_grad():
            for name in _DRAWN:
                fresh[name].mul_(options.special_token_std)
        state = CompletedCheckpoint(weights, found, model, fresh=fresh)
        return iter_eve(state, model, resize_vocabulary=options.vocab_size is not None)

    write_megatron(
        dest,
        model,
        fill,
        dtype=dtype,
        config_text=model_text(model, origin=str(source.resolve())),
        seed=options.seed,
        overwrite=options.overwrite,
    )
    return Imported(model=model, dtype=dtype, num_tensors=num_tensors)


def planned_mapping(source: Path, options: ImportOptions) -> list[str]:
    """One line for each tensor that a conversion would write, after all its checks; for a dry run."""
    found = read_hf_config(source, patch_embed_dim=options.patch_embed_dim)
    model = target_model(found.model, options)
    weights = SafetensorsFolder(source)
    shapes = dict(check_source(weights, found, model, options))
    copies = vision_copies(found.model, model)
    lines = []
    for rule in tensor_rules(model):
        is_new = found.kind == "qwen2" and rule.eve.startswith(_PATCH_EMBEDDING)
        origin = "initialised" if is_new else ", ".join(copies.get(name, name) for name in rule.hf)
        lines.append(f"{rule.eve} {list(shapes[rule.eve])} <- {origin}")
    return lines


def check_source(
    weights: SafetensorsFolder, found: HfModel, model: ModelConfig, options: ImportOptions
) -> list[tuple[str, tuple[int, ...]]]:
    """Run the whole conversion on shapes alone; returns EveModel's names and shapes, or raises as it would."""
    rules = {rule.eve: rule for rule in tensor_rules(model)}
    fresh = {
        name: torch.empty(rule.hf_shapes[0], device="meta")
        for name, rule in rules.items()
        if name.startswith(_PATCH_EMBEDDING)
    }
    state = CompletedCheckpoint(weights.headers(), found, model, fresh=fresh)
    pairs = iter_eve(state, model, resize_vocabulary=options.vocab_size is not None)
    return [(name, tuple(tensor.shape)) for name, tensor in pairs]


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


def stored_dtype(weights: SafetensorsFolder) -> Dtype:
    """The stored dtype, if a checkpoint of ours can have it."""
    names: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    found = weights.dtype()
    if found not in names:
        raise CheckpointError(
            f"The checkpoint is {found}; choose --dtype bf16 or --dtype fp32 to convert it."
        )
    return names[found]


__all__ = ["ImportOptions", "Imported", "import_hf", "planned_mapping"]
