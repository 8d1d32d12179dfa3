# SPDX-License-Identifier: Apache-2.0
"""Unsharded state dicts in either form, and the pure functions that turn one into the other.

Every function moves rows; none computes. So both directions are exact inverses, byte for byte, in any dtype. Views are
lazy: over tensors that are read on demand they stream. A tensor that does not fit the table of names.py is refused with
a CheckpointError that names it: a missing, left over or mis-shaped one, or two names for the same weight.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError

from .names import HF_ALIASES, TensorRule, tensor_rules

Shape = tuple[int, ...]
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

ROTARY = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""A buffer in early Llama checkpoints (transformers before 4.32): computed from the configuration, no weight."""


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


class EveView(Mapping[str, Tensor]):
    """EveModel's unsharded state dict made of official Hugging Face tensors, each one when it is asked for.

    `resize_vocabulary` lets the embedding and output layer have another number of rows than `model.vocab_size` (152064
    in Qwen2.5-7B, 151665 after the official loader, or padded for tensor parallelism): rows beyond are cut, missing
    ones are zeros.

    Raises: CheckpointError, when it is made, if names do not fit the model; when a tensor is read, if its shape does
    not."""

    def __init__(
        self, state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool
    ) -> None:
        self._source, self._model, self._resize = state_dict, model, resize_vocabulary
        self._rules = {rule.eve: rule for rule in tensor_rules(model)}
        self._names = canonical_hf_names(state_dict)
        for name in sorted(filter(ROTARY.fullmatch, self._names)):
            check_rotary(name, state_dict[self._names.pop(name)], model)
        if model.tie_word_embeddings and _EMBEDDING in self._names and _HEAD in self._names:
            _check_tied_head(state_dict)
            self._names.pop(_HEAD)
        expected = {name for rule in self._rules.values() for name in rule.hf}
        check_names(found=set(self._names), expected=expected, what="Hugging Face checkpoint")

    def __getitem__(self, name: str) -> Tensor:
        return _to_eve(self._rules[name], self.parts(name), self._model)

    def parts(self, name: str) -> list[Tensor]:
        """The Hugging Face tensors that make up an EveModel tensor, in the table's order."""
        rule, parts = self._rules[name], []
        any_rows = self._resize and rule.kind == "vocabulary"
        for hf_name, shape in zip(rule.hf, rule.hf_shapes, strict=True):
            tensor = self._source[self._names[hf_name]]
            check_shape(hf_name, found=tuple(tensor.shape), expected=shape, any_rows=any_rows)
            parts.append(tensor)
        return parts

    def hf_names(self, name: str) -> tuple[str, ...]:
        """Names in the checkpoint of the tensors that `parts` gives."""
        return tuple(self._names[hf_name] for hf_name in self._rules[name].hf)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


class HfView(Mapping[str, Tensor]):
    """Official Hugging Face tensors made of EveModel's unsharded state dict: the inverse of `EveView`.

    `read_rows(name, first, last)`: rows of a tensor of `state_dict` without the others, where that is cheaper. q, k and
    v are neighbours in the order of iteration; what they are made of is read once for the three, and let go with the
    next tensor.

    Raises: as EveView."""

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        model: ModelConfig,
        *,
        resize_vocabulary: bool,
        read_rows: Callable[[str, int, int], Tensor] | None = None,
    ) -> None:
        self._source, self._model, self._resize = state_dict, model, resize_vocabulary
        self._read_rows = read_rows
        rules = tensor_rules(model)
        self._rule_of = {name: rule for rule in rules for name in rule.hf}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        check_names(
            found=set(state_dict), expected={rule.eve for rule in rules}, what="EveModel checkpoint"
        )

    def __getitem__(self, name: str) -> Tensor:
        rule = self._rule_of[name]
        if rule.kind == "qkv" and self._last[0] == rule.eve:
            return self._last[1][name]
        self._last = ("", {})  # let it go before anything else is read
        if rule.kind == "gate_up" and self._read_rows is not None:
            number, rows = rule.hf.index(name), rule.hf_shapes[0][0]
            return self._read_rows(rule.eve, number * rows, (number + 1) * rows)
        parts = self._parts(rule)
        if rule.kind == "qkv":
            self._last = (rule.eve, parts)
        return parts[name]

    def _parts(self, rule: TensorRule) -> dict[str, Tensor]:
        tensor = self._source[rule.eve]
        any_rows = self._resize and rule.kind == "vocabulary"
        check_shape(
            rule.eve, found=tuple(tensor.shape), expected=eve_shape(rule), any_rows=any_rows
        )
        return dict(zip(rule.hf, _to_hf(rule, tensor, self._model), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rule_of)

    def __len__(self) -> int:
        return len(self._rule_of)


def hf_to_eve(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool = False
) -> dict[str, Tensor]:
    """EveModel's whole state dict; see EveView."""
    return dict(EveView(state_dict, model, resize_vocabulary=resize_vocabulary))


def eve_to_hf(
    state_dict: Mapping[str, Tensor], model: ModelConfig, *, resize_vocabulary: bool = False
) -> dict[str, Tensor]:
    """All official Hugging Face tensors; see HfView. The inverse of `hf_to_eve`."""
    return dict(HfView(state_dict, model, resize_vocabulary=resize_vocabulary))


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


def check_rotary(name: str, inv_freq: Tensor, model: ModelConfig) -> None:
    """Refuse rotary frequencies, which early Llama checkpoints store, that are not those of the configuration."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    expected = model.rope_theta**-exponents
    check_shape(name, found=tuple(inv_freq.shape), expected=tuple(expected.shape), any_rows=False)
    if inv_freq.is_meta:  # shapes only: a dry run
        return
    # Stored in half precision by some; a scaled RoPE is off by factors.
    if not torch.allclose(inv_freq.double(), expected, rtol=1e-2, atol=1e-7):
        raise CheckpointError(
            f"Tensor {name!r} holds other frequencies than rope_theta={model.rope_theta:g} gives; the checkpoint "
            "was trained with another rope_theta or a scaled RoPE."
        )


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
    head, embedding = state_dict[_HEAD], state_dict[_EMBEDDING]
    is_same = head.shape == embedding.shape
    if is_same and not head.is_meta:  # shapes only: a dry run
        is_same = torch.equal(head, embedding)
    if not is_same:
        raise CheckpointError(
            f"tie_word_embeddings is true, but {_HEAD!r} differs from {_EMBEDDING!r}; set tie_word_embeddings to false "
            "in config.json."
        )


def _listing(names: list[str], *, limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
