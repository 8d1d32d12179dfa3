# SPDX-License-Identifier: Apache-2.0
"""Unsharded state dicts in either form, and the pure functions that turn one into the other.

Every function moves rows; none computes. So both directions are exact inverses, byte for byte, in any
dtype. What does not fit the table of names.py is refused with a CheckpointError that names the tensor:
a missing, left over or mis-shaped one, or two names for the same weight.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from checkpoints_convert.names import HF_ALIASES, TensorRule, tensor_rules
from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError

Shape = tuple[int, ...]


def merge_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_kv_heads: int) -> Tensor:
    """Interleave per key/value group as megatron-core's linear_qkv does: [q.. k v] of group 0, of group 1, ...

    Shapes: weights [N*D, H], [G*D, H], [G*D, H] -> [(N + 2G)*D, H]; biases the same without H.
    """
    groups = [tensor.unflatten(0, (num_kv_heads, -1)) for tensor in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def split_qkv(qkv: Tensor, *, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `merge_qkv`."""
    groups = qkv.unflatten(0, (num_kv_heads, -1))
    sizes = [groups.shape[1] - 2 * head_dim, head_dim, head_dim]
    q, k, v = (part.flatten(0, 1).contiguous() for part in groups.split(sizes, dim=1))
    return q, k, v


def merge_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """[F, H] and [F, H] -> [2F, H], the gate first."""
    return torch.cat((gate, up))


def split_gate_up(fc1: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `merge_gate_up`."""
    gate, up = fc1.chunk(2)
    return gate.contiguous(), up.contiguous()


def resize_rows(table: Tensor, num_rows: int) -> Tensor:
    """The first `num_rows` rows; rows that are missing are zeros (ids no tokenizer produces)."""
    missing = num_rows - table.shape[0]
    if missing > 0:
        return torch.cat((table, table.new_zeros(missing, table.shape[1])))
    return table[:num_rows].contiguous()


def hf_to_eve(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool = False
) -> dict[str, Tensor]:
    """EveModel's unsharded state dict out of official Hugging Face tensors.

    `resize_vocabulary` lets the embedding and output layer have another number of rows than
    `model.vocab_size` (152064 in Qwen2.5-7B, 151665 after the official loader, or padded for tensor
    parallelism): rows beyond are cut, missing ones are zeros.
    """
    return dict(iter_eve(state_dict, model, resize_vocabulary=resize_vocabulary))


def iter_eve(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool
) -> Iterator[tuple[str, Tensor]]:
    """`hf_to_eve`, one tensor at a time, so that a lazy mapping need not be in memory as a whole."""
    rules = tensor_rules(model)
    source_names = canonical_hf_names(state_dict)
    expected = {name for rule in rules for name in rule.hf}
    if model.tie_word_embeddings and "lm_head.weight" in source_names:
        _check_tied_head(state_dict)
        source_names.pop("lm_head.weight")
    check_names(found=set(source_names), expected=expected, what="Hugging Face checkpoint")
    for rule in rules:
        parts = []
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            tensor = state_dict[source_names[name]]
            any_rows = resize_vocabulary and rule.kind == "vocabulary"
            check_shape(name, found=tuple(tensor.shape), expected=shape, any_rows=any_rows)
            parts.append(tensor)
        yield rule.eve, _to_eve(rule, parts, model)


def eve_to_hf(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool = False
) -> dict[str, Tensor]:
    """Official Hugging Face tensors out of EveModel's unsharded state dict: the inverse of `hf_to_eve`."""
    return dict(iter_hf(state_dict, model, resize_vocabulary=resize_vocabulary))


def iter_hf(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool
) -> Iterator[tuple[str, Tensor]]:
    """`eve_to_hf`, one tensor at a time."""
    rules = tensor_rules(model)
    check_names(
        found=set(state_dict), expected={rule.eve for rule in rules}, what="EveModel checkpoint"
    )
    for rule in rules:
        tensor = state_dict[rule.eve]
        any_rows = resize_vocabulary and rule.kind == "vocabulary"
        check_shape(
            rule.eve, found=tuple(tensor.shape), expected=eve_shape(rule), any_rows=any_rows
        )
        yield from zip(rule.hf, _to_hf(rule, tensor, model), strict=True)


def eve_shape(rule: TensorRule) -> Shape:
    """Unsharded shape of the EveModel tensor: the parts stacked along the first dim."""
    rows = sum(shape[0] for shape in rule.hf_shapes)
    return (rows, *rule.hf_shapes[0][1:])


def canonical_hf_names(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Today's official name -> name in this checkpoint (they differ in early official ones)."""
    names: dict[str, str] = {}
    for name in state_dict:
        canonical = HF_ALIASES.get(name, name)
        if canonical in names:
            raise CheckpointError(
                f"The checkpoint holds {names[canonical]!r} and {name!r}, two names of the same "
                f"weight {canonical!r}; keep one of them."
            )
        names[canonical] = name
    return names


def check_names(*, found: set[str], expected: set[str], what: str) -> None:
    """Refuse tensors that are missing or that no rule of the table reads."""
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"lacks {len(missing)} tensors: {_listing(missing)}")
    if extra := sorted(found - expected):
        problems.append(f"has {len(extra)} tensors that the model does not: {_listing(extra)}")
    if problems:
        raise CheckpointError(
            f"The {what} {' and '.join(problems)}. Check that split (moe_part), num_layers and "
            "tie_word_embeddings of the configuration are those of this checkpoint."
        )


def check_shape(name: str, *, found: Shape, expected: Shape, any_rows: bool) -> None:
    """Refuse a tensor of another shape than the configuration says; `any_rows` frees the first dim."""
    if found == expected or (any_rows and found[1:] == expected[1:]):
        return
    message = f"Tensor {name!r} has shape {list(found)}, the configuration says {list(expected)}."
    if len(found) == 2 and found[1:] == expected[1:] and ("embed" in name or "head" in name):
        message += " To cut or pad the vocabulary, ask for it (--vocab-size)."
    raise CheckpointError(message)


def _to_eve(rule: TensorRule, parts: list[Tensor], model: ModelConfig) -> Tensor:
    if rule.kind == "qkv":
        return merge_qkv(*parts, num_kv_heads=model.num_kv_heads)
    if rule.kind == "gate_up":
        return merge_gate_up(*parts)
    if rule.kind == "vocabulary":
        return resize_rows(parts[0], model.vocab_size)
    return parts[0]


def _to_hf(rule: TensorRule, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    if rule.kind == "qkv":
        return split_qkv(tensor, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim)
    if rule.kind == "gate_up":
        return split_gate_up(tensor)
    if rule.kind == "vocabulary":
        return (resize_rows(tensor, model.vocab_size),)
    return (tensor,)


def _check_tied_head(state_dict: Mapping[str, Tensor]) -> None:
    head, embedding = state_dict["lm_head.weight"], state_dict["model.embed_tokens.weight"]
    if head.is_meta:  # shapes only: a dry run
        return
    if not torch.equal(head, embedding):
        raise CheckpointError(
            "tie_word_embeddings is true, but 'lm_head.weight' differs from "
            "'model.embed_tokens.weight'; set tie_word_embeddings to false in config.json."
        )


def _listing(names: list[str], *, limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
