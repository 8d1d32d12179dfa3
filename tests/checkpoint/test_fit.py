# SPDX-License-Identifier: Apache-2.0
"""Weights that do not fit are refused by the field, and values that are not finite by the tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints_convert.names import tensor_rules
from checkpoints_convert.tensors import eve_shape
from checkpoints_convert.torch_dist import stored_key
from megatron_eve.checkpoint.fit import refuse_other_shapes
from megatron_eve.checkpoint.weights import load_weights
from megatron_eve.config.model_lines import flat_model
from megatron_eve.config.schema import ModelConfig, ParallelConfig
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.finite import is_finite
from tests.support.save_weights import save_weights
from tests.support.tiny import ALL, DENSE, layout, tiny_model
from tests.support.train_once import build, run_config

TWO = {  # another number in each field that shapes tell, one at a time, with the tensors' own
    "num_layers": "model.num_layers=8, but the tensors of W have 4",
    "hidden_size": "model.hidden_size=64, but the tensors of W have 32",
    "ffn_hidden_size": "model.ffn_hidden_size=96, but the tensors of W have 48",
    "num_attention_heads": "model.num_attention_heads x head_dim=64, but the tensors of W have 32",
    "num_kv_heads": r"model.(num_attention_heads + 2 num_kv_heads) x head_dim=96, but the tensors of W have 64",
    "vocab_size": "model.vocab_size=122, but the tensors of W have 61",
    "patch_stride": "model.patch_stride=4, but the tensors of W have 2",
    "dense_stride": "model.dense_stride=4, but the tensors of W have 2",
    "patch_embed_dim": "model.patch_embed_dim=24, but the tensors of W have 12",
}


def stored_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """As a checkpoint has them: layers stacked."""
    shapes = {}
    for rule in tensor_rules(model):
        key, layer = stored_key(rule.eve)
        shapes[key] = eve_shape(rule) if layer is None else (model.num_layers, *eve_shape(rule))
    return shapes


@pytest.mark.parametrize("split", [ALL, DENSE])
@pytest.mark.parametrize("field", TWO)
def test_each_field_that_shapes_tell_is_named(field: str, split) -> None:  # type: ignore[no-untyped-def]
    stored = stored_shapes(tiny_model(split))
    refuse_other_shapes(tiny_model(split), stored, folder=Path("W"))
    other = replace(tiny_model(split), **{field: 2 * getattr(tiny_model(split), field)})
    with pytest.raises(CheckpointError) as caught:
        refuse_other_shapes(other, stored, folder=Path("W"))
    assert TWO[field] in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_known_by_its_absence(tied: bool) -> None:
    stored = stored_shapes(tiny_model(tied=tied))
    refuse_other_shapes(tiny_model(tied=tied), stored, folder=Path("W"))
    with pytest.raises(CheckpointError, match=f"tie_word_embeddings={str(not tied).lower()}, but"):
        refuse_other_shapes(tiny_model(tied=not tied), stored, folder=Path("W"))


def test_rows_that_pad_for_tensor_parallelism_are_no_other_vocabulary() -> None:
    stored = {**stored_shapes(tiny_model()), "embedding.word_embeddings.weight": (64, 32)}
    refuse_other_shapes(tiny_model(), stored, folder=Path("W"))


def save_with(value: float | None, name: str, out: str, parallel: ParallelConfig) -> None:
    """Fresh weights, this parameter's last value replaced; the folder says its model."""
    chunks, *_ = build(run_config(tiny_model(), parallel), weights=None)
    with torch.no_grad():
        for parameter_name, parameter in chunks[0].named_parameters():
            if value is not None and parameter_name == name:
                parameter.view(-1)[-1] = value
    lines = "".join(f"{k}: {v}\n" for k, v in flat_model(tiny_model()).items())
    save_weights(chunks, out, config_text=lines)


def refused_load(model: ModelConfig, source: str, parallel: ParallelConfig) -> str:
    chunks, *_ = build(run_config(model, parallel), weights=None)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_weights(chunks, source, copy_text_to_vision=False)
    return str(caught.value)


NAME = "decoder.layers.2.mlp.linear_fc2.vision.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_on_every_rank(gloo1, gloo2, tmp_path, value):  # type: ignore[no-untyped-def]
    """Layer 2 is the second stage's first; the stage before it has only finite values."""
    folder = str(tmp_path / "weights")
    gloo1.run(save_with, value, NAME, folder, layout())
    for message in gloo2.run(refused_load, tiny_model(), folder, layout(pipeline=2)):
        assert f"{folder}: {NAME} holds 1 values of" in message


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "max_position_embeddings"])
def test_a_load_compares_the_constants_of_the_folder_it_reads(gloo2, tmp_path, field):  # type: ignore[no-untyped-def]
    """No tensor's shape tells them."""
    folder = str(tmp_path / "weights")
    parallel = layout(tensor=2)
    gloo2.run(save_with, None, "", folder, parallel)
    other = replace(tiny_model(), **{field: 2 * getattr(tiny_model(), field)})
    for message in gloo2.run(refused_load, other, folder, parallel):
        assert message.startswith(f"model.{field}=")
        assert f"but the weights of {folder} have" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_looked_at(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    assert is_finite(torch.full((2,), torch.finfo(dtype).max, dtype=dtype))
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in range(15):
            bad = tensor.clone()
            bad.view(-1)[place] = value
            assert not is_finite(bad)
