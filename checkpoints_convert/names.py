# SPDX-License-Identifier: Apache-2.0
"""EveModel's parameters and the official Hugging Face tensors of EVEv2 that make up each, with names and shapes.

Both directions of the conversion read `tensor_rules` and nothing else. A layer's tensors come from the one table of the
decoder (megatron_eve/config/decoder.py), those around the layers stand here. The official names are those of
baaivision/EVE (EVEv2, model_type `eve-qwen2`): text weights keep Qwen2's names, vision weights carry the prefix `moe_`
on the module's name. A component that is not split has the plain name on both sides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_eve.config.decoder import Joined, Linear, Norm, decoder_layer, patch_convolutions
from megatron_eve.config.schema import ModelConfig, SplitConfig

Kind = Joined | Literal["vocabulary"]
"""How the Hugging Face tensors of a rule become the EveModel tensor; the functions are in tensors.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRule:
    """One EveModel tensor and the Hugging Face tensors that make it up."""

    eve: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind = "copy"


_TOWER = "model.vision_tower"

HF_ALIASES: dict[str, str] = {
    f"{_TOWER}.start_embedding": f"{_TOWER}.class_embedding",
    f"{_TOWER}.end_embedding": f"{_TOWER}.split_embedding",
}
"""Names of early official checkpoints (before baaivision/EVE 5af7ca7) and what they are called now."""


def tensor_rules(model: ModelConfig) -> list[TensorRule]:
    """Every tensor of this model in the order of the forward pass, layer by layer."""
    vocabulary = (model.vocab_size, model.hidden_size)
    rules = [
        _rule(
            "embedding.word_embeddings.weight",
            "model.embed_tokens.weight",
            vocabulary,
            "vocabulary",
        ),
        *_patch_embedding_rules(model),
    ]
    for layer in range(model.num_layers):
        for row in decoder_layer(model).rows:
            rules += _layer_rules(row, layer=layer, split=model.split)
    rules.append(_rule("final_layernorm.weight", "model.norm.weight", (model.hidden_size,)))
    if not model.tie_word_embeddings:
        rules.append(_rule("output_layer.weight", "lm_head.weight", vocabulary, "vocabulary"))
    return rules


def text_twin(hf_name: str) -> str | None:
    """The text weight that a vision weight starts as a copy of (official repeat_moe.py); else None."""
    return hf_name.replace("moe_", "") if "moe_" in hf_name else None


def _rule(eve: str, hf: str, shape: tuple[int, ...], kind: Kind = "copy") -> TensorRule:
    return TensorRule(eve=eve, hf=(hf,), hf_shapes=(shape,), kind=kind)


def _patch_embedding_rules(model: ModelConfig) -> Iterator[TensorRule]:
    for place, convolution in zip((0, 2), patch_convolutions(model), strict=True):  # 1: GELU
        eve, hf = f"patch_embedding.{convolution.name}", f"{_TOWER}.patch_embedding.{place}"
        yield _rule(f"{eve}.weight", f"{hf}.weight", convolution.shape)
        yield _rule(f"{eve}.bias", f"{hf}.bias", (convolution.outputs,))
    for name in ("class_embedding", "split_embedding"):
        yield _rule(f"patch_embedding.{name}", f"{_TOWER}.{name}", (model.hidden_size,))


def _layer_rules(row: Norm | Linear, *, layer: int, split: SplitConfig) -> Iterator[TensorRule]:
    branches = ((".text", ""), (".vision", "moe_")) if row.is_split(split) else (("", ""),)
    for tensor, dims in row.tensors.items():
        for branch, moe in branches:
            modules = [part.hf.format(moe=moe) for part in row.parts]
            yield TensorRule(
                eve=f"decoder.layers.{layer}.{row.name}{branch}.{tensor}",
                hf=tuple(f"model.layers.{layer}.{module}.{tensor}" for module in modules),
                hf_shapes=tuple((part.rows, *dims) for part in row.parts),
                kind=row.joined,
            )
