# SPDX-License-Identifier: Apache-2.0
"""The one table of names between EveModel's parameters and the official Hugging Face names of EVEv2.

Each row says which Hugging Face tensors make up one EveModel tensor, with their shapes in symbols. Both
directions of the conversion read this table and nothing else. The official names are those of
baaivision/EVE (EVEv2, model_type `eve-qwen2`): text weights keep Qwen2's names, vision weights carry the
prefix `moe_` on the module's name. A component that is not split has the plain name on both sides.

Marks inside the patterns: `{i}` layer number, `{branch}` ".vision", ".text" or "" (EveModel), `{moe}`
"moe_" or "" (Hugging Face).
"""

from dataclasses import dataclass
from typing import Literal

from megatron_eve.config.schema import ModelConfig, SplitConfig

Kind = Literal["copy", "qkv", "gate_up", "vocabulary"]
"""How the Hugging Face tensors of a row become the EveModel tensor; the functions are in tensors.py."""

Component = Literal["none", "norm", "attention", "ffn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One EveModel tensor and the Hugging Face tensors that make it up, as patterns."""

    eve: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]  # of the Hugging Face tensors, one word per dim (see `dims`)
    kind: Kind
    component: Component


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRule:
    """A row of the table for one model and layer: concrete names and shapes."""

    eve: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind


def _row(eve: str, *hf: tuple[str, str], kind: Kind = "copy", component: Component = "none") -> Row:
    names, shapes = tuple(name for name, _ in hf), tuple(shape for _, shape in hf)
    return Row(eve=eve, hf=names, shapes=shapes, kind=kind, component=component)


_EVE, _HF = "decoder.layers.{i}", "model.layers.{i}"
_ATTENTION, _MLP = f"{_HF}.self_attn.{{moe}}", f"{_HF}.{{moe}}mlp"
_TOWER = "model.vision_tower"

OUTPUT_LAYER = "output_layer.weight"

TABLE: tuple[Row, ...] = (
    _row(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight", "vocab hidden"),
        kind="vocabulary",
    ),
    _row(
        "patch_embedding.conv1.weight",
        (f"{_TOWER}.patch_embedding.0.weight", "patch rgb stride stride"),
    ),
    _row("patch_embedding.conv1.bias", (f"{_TOWER}.patch_embedding.0.bias", "patch")),
    _row(
        "patch_embedding.conv2.weight",
        (f"{_TOWER}.patch_embedding.2.weight", "hidden patch dense dense"),
    ),
    _row("patch_embedding.conv2.bias", (f"{_TOWER}.patch_embedding.2.bias", "hidden")),
    _row("patch_embedding.class_embedding", (f"{_TOWER}.class_embedding", "hidden")),
    _row("patch_embedding.split_embedding", (f"{_TOWER}.split_embedding", "hidden")),
    _row(
        f"{_EVE}.input_layernorm{{branch}}.weight",
        (f"{_HF}.{{moe}}input_layernorm.weight", "hidden"),
        component="norm",
    ),
    _row(
        f"{_EVE}.self_attention.linear_qkv{{branch}}.weight",
        (f"{_ATTENTION}q_proj.weight", "query hidden"),
        (f"{_ATTENTION}k_proj.weight", "key hidden"),
        (f"{_ATTENTION}v_proj.weight", "key hidden"),
        kind="qkv",
        component="attention",
    ),
    _row(
        f"{_EVE}.self_attention.linear_qkv{{branch}}.bias",
        (f"{_ATTENTION}q_proj.bias", "query"),
        (f"{_ATTENTION}k_proj.bias", "key"),
        (f"{_ATTENTION}v_proj.bias", "key"),
        kind="qkv",
        component="attention",
    ),
    _row(
        f"{_EVE}.self_attention.linear_proj{{branch}}.weight",
        (f"{_ATTENTION}o_proj.weight", "hidden query"),
        component="attention",
    ),
    _row(
        f"{_EVE}.pre_mlp_layernorm{{branch}}.weight",
        (f"{_HF}.{{moe}}post_attention_layernorm.weight", "hidden"),
        component="norm",
    ),
    _row(
        f"{_EVE}.mlp.linear_fc1{{branch}}.weight",
        (f"{_MLP}.gate_proj.weight", "ffn hidden"),
        (f"{_MLP}.up_proj.weight", "ffn hidden"),
        kind="gate_up",
        component="ffn",
    ),
    _row(
        f"{_EVE}.mlp.linear_fc2{{branch}}.weight",
        (f"{_MLP}.down_proj.weight", "hidden ffn"),
        component="ffn",
    ),
    _row("final_layernorm.weight", ("model.norm.weight", "hidden")),
    _row(OUTPUT_LAYER, ("lm_head.weight", "vocab hidden"), kind="vocabulary"),
)

HF_ALIASES: dict[str, str] = {
    f"{_TOWER}.start_embedding": f"{_TOWER}.class_embedding",
    f"{_TOWER}.end_embedding": f"{_TOWER}.split_embedding",
}
"""Names of early official checkpoints (before baaivision/EVE 5af7ca7) and what they are called now."""


def dims(model: ModelConfig) -> dict[str, int]:
    """The words of the table's shapes as numbers."""
    return {
        "vocab": model.vocab_size,
        "hidden": model.hidden_size,
        "query": model.num_attention_heads * model.head_dim,
        "key": model.num_kv_heads * model.head_dim,
        "ffn": model.ffn_hidden_size,
        "patch": model.patch_embed_dim,
        "stride": model.patch_stride,
        "dense": model.dense_stride,
        "rgb": 3,
    }


def tensor_rules(model: ModelConfig) -> list[TensorRule]:
    """Every tensor of this model, in the table's order, layer by layer."""
    size = dims(model)
    rules: list[TensorRule] = []
    layers = [row for row in TABLE if "{i}" in row.eve]
    first = TABLE.index(layers[0])
    for row in TABLE[:first]:
        rules += _expand(row, layer=0, split=model.split, size=size)
    for layer in range(model.num_layers):
        for row in layers:
            rules += _expand(row, layer=layer, split=model.split, size=size)
    for row in TABLE[first + len(layers) :]:
        if row.eve == OUTPUT_LAYER and model.tie_word_embeddings:
            continue
        rules += _expand(row, layer=0, split=model.split, size=size)
    return rules


def text_twin(hf_name: str) -> str | None:
    """The text weight that a vision weight starts as a copy of (official repeat_moe.py); else None."""
    return hf_name.replace("moe_", "") if "moe_" in hf_name else None


def _expand(row: Row, *, layer: int, split: SplitConfig, size: dict[str, int]) -> list[TensorRule]:
    is_split = {
        "none": False,
        "norm": split.norm,
        "attention": split.attention,
        "ffn": split.ffn,
    }[row.component]
    branches = ((".text", ""), (".vision", "moe_")) if is_split else (("", ""),)
    shapes = tuple(tuple(size[word] for word in shape.split()) for shape in row.shapes)
    return [
        TensorRule(
            eve=row.eve.format(i=layer, branch=branch),
            hf=tuple(name.format(i=layer, moe=moe) for name in row.hf),
            hf_shapes=shapes,
            kind=row.kind,
        )
        for branch, moe in branches
    ]
