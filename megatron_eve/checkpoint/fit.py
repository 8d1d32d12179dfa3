# SPDX-License-Identifier: Apache-2.0
"""Whether stored weights fit the model that was built: by their shapes, field by field, and by their values.

Names, shapes and dtypes of a checkpoint's tensors show most of its model. They are compared with the configuration
before a tensor is read, so that a refusal names `model.num_layers` and not a tensor on a rank.
config/weights_model.py compares what they cannot show (rotary base, epsilon, how heads share a width). Values that
are not finite are refused by name: no step could mend them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.writer import raise_together
from megatron_eve.config.decoder import decoder_layer
from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.finite import check_finite
from megatron_eve.model.eve_model import EveModel

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_MAX_TENSOR_PARALLEL = 64  # padding rows of a stored table are fewer
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def refuse_other_shapes(model: ModelConfig, stored: Shapes, *, folder: Path) -> None:
    """`stored`: shapes of the whole tensors, layers stacked. The same on every rank.

    Raises: CheckpointError with a line for each field that the tensors contradict."""
    lines = [
        f"{field}={here}, but the tensors of {folder} have {there} ({name} is {list(stored[name])}); make them "
        "the same or load other weights."
        for field, here, there, name in _contradictions(model, stored)
    ]
    if lines:
        raise CheckpointError("\n".join(lines))


def _contradictions(model: ModelConfig, stored: Shapes) -> Iterator[tuple[str, Any, Any, str]]:
    """(field, its value, the tensors' value, which tensor)."""
    layer = decoder_layer(model)
    measured = (
        ("num_layers", model.num_layers, "decoder.layers.mlp.linear_fc2.weight", 0),
        ("hidden_size", model.hidden_size, "final_layernorm.weight", 0),
        ("ffn_hidden_size", model.ffn_hidden_size, "decoder.layers.mlp.linear_fc2.weight", 2),
        ("num_attention_heads x head_dim", layer.query_width,
         "decoder.layers.self_attention.linear_proj.weight", 2),
        ("(num_attention_heads + 2 num_kv_heads) x head_dim", layer.qkv.outputs,
         "decoder.layers.self_attention.linear_qkv.weight", 1),
        ("patch_embed_dim", model.patch_embed_dim, "patch_embedding.conv1.weight", 0),
        ("patch_stride", model.patch_stride, "patch_embedding.conv1.weight", 2),
        ("dense_stride", model.dense_stride, "patch_embedding.conv2.weight", 2),
    )  # fmt: skip
    for field, here, unsplit, axis in measured:
        name = next((n for n in (unsplit, _text_branch(unsplit)) if n in stored), None)
        if name is not None and stored[name][axis] != here:
            yield f"model.{field}", here, stored[name][axis], name
    if _EMBEDDING in stored:
        rows = stored[_EMBEDDING][0]
        if not model.vocab_size <= rows < model.vocab_size + _MAX_TENSOR_PARALLEL:
            yield "model.vocab_size", model.vocab_size, rows, _EMBEDDING
        is_tied = _HEAD not in stored
        if is_tied != model.tie_word_embeddings:
            wanted, found = str(model.tie_word_embeddings).lower(), str(is_tied).lower()
            yield "model.tie_word_embeddings", wanted, found, _EMBEDDING if is_tied else _HEAD


def _text_branch(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.text.{leaf}"


def refuse_non_finite(chunks: Sequence[EveModel], *, source: str | Path) -> None:
    """Collective. Raises: CheckpointError on every rank, naming a parameter with a value that is not finite."""
    problem = None
    try:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                check_finite(_global_name(chunk, name), parameter.detach(), source=source)
    except CheckpointError as error:
        problem = str(error)
    raise_together(problem)


def _global_name(chunk: EveModel, name: str) -> str:
    """The name with the layer's number in the whole model: each pipeline stage counts its own from 0."""

    def numbered(match: re.Match[str]) -> str:
        layer: Any = chunk.decoder.layers[int(match[1])]
        return f"decoder.layers.{layer.layer_number - 1}."

    return _LAYER.sub(numbered, name)
