# SPDX-License-Identifier: Apache-2.0
"""Weights folders: any layout to any other, text copied to vision, and refusals that name the tensor or file."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_eve.checkpoint import weights
from megatron_eve.checkpoint.manifest import check_folder
from megatron_eve.checkpoint.sharding import sharded_weights
from megatron_eve.checkpoint.weights import load_weights, weights_folder
from megatron_eve.config.schema import ModelConfig, ParallelConfig
from megatron_eve.errors import CheckpointError
from tests.support.fresh import save_fresh
from tests.support.save_weights import save_weights
from tests.support.tiny import ALL, DENSE, SplitConfig, layout, tiny_model
from tests.support.train_once import build, read_weights, run_config


def resave(model: ModelConfig, parallel: ParallelConfig, source: str, out: str) -> None:
    chunks, *_ = build(run_config(model, parallel), weights=source)
    save_weights(chunks, out, config_text="")


def load_into(
    model: ModelConfig,
    source: str,
    copy_text_to_vision: bool,
    parallel: ParallelConfig | None = None,
) -> dict[str, torch.Tensor]:
    (chunk,), *_ = build(run_config(model, parallel or layout()), weights=None)
    load_weights([chunk], source, copy_text_to_vision=copy_text_to_vision)
    return {name: p.detach() for name, p in chunk.named_parameters()}


def refusal(model: ModelConfig, source: str, parallel: ParallelConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_into(model, source, False, parallel)
    return str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2-sp", "pp2-virtual"])
def test_any_layout_to_any_other_is_exact(gloo1, gloo2, tmp_path, name, tied):  # type: ignore[no-untyped-def]
    """SwiGLU's gate and up, the padded vocabulary (61 of 62 rows) and tied embeddings are where this goes wrong."""
    parallel = {
        "tp2": layout(tensor=2),
        "tp2-sp": layout(tensor=2, sequence_parallel=True),
        "pp2": layout(pipeline=2),
        "pp2-virtual": layout(pipeline=2, virtual=2),
    }[name]
    model = tiny_model(tied=tied)
    gloo1.run(save_fresh, run_config(model, layout()), str(tmp_path / "one"))
    gloo2.run(resave, model, parallel, str(tmp_path / "one"), str(tmp_path / "two"))
    (before,) = gloo1.run(read_weights, model, str(tmp_path / "one"))
    (after,) = gloo1.run(read_weights, model, str(tmp_path / "two"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("split", [ALL, SplitConfig(norm=False, attention=False, ffn=True)])
def test_text_is_copied_to_vision(gloo1, tmp_path, split):  # type: ignore[no-untyped-def]
    gloo1.run(save_fresh, run_config(tiny_model(DENSE), layout()), str(tmp_path / "dense"))
    (dense,) = gloo1.run(read_weights, tiny_model(DENSE), str(tmp_path / "dense"))
    (loaded,) = gloo1.run(load_into, tiny_model(split), str(tmp_path / "dense"), True)
    assert any(".vision." in name for name in loaded)
    for name, tensor in loaded.items():
        original = name.replace(".vision.", ".").replace(".text.", ".")
        assert torch.equal(tensor, dense[original]), name


def test_without_the_copy_a_dense_checkpoint_is_refused(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    gloo1.run(save_fresh, run_config(tiny_model(DENSE), layout()), str(tmp_path / "dense"))
    (message,) = gloo1.run(refusal, tiny_model(ALL), str(tmp_path / "dense"))
    assert "lacks decoder.layers.input_layernorm.text.weight" in message
    assert "checkpoint.copy_text_to_vision=true" in message


def test_wrong_shape_is_refused_by_its_field(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    gloo1.run(save_fresh, run_config(tiny_model(layers=2), layout()), str(tmp_path / "two"))
    (message,) = gloo1.run(refusal, tiny_model(layers=4), str(tmp_path / "two"))
    assert message.startswith(f"model.num_layers=4, but the tensors of {tmp_path / 'two'} have 2 (")


@pytest.mark.parametrize("name", ["patch_embedding.conv1.bias", "final_layernorm.weight"])
def test_a_wrong_shape_that_one_of_two_ranks_reads_is_refused_by_both(gloo1, gloo2, tmp_path, name):  # type: ignore[no-untyped-def]
    """The other one, which reads other tensors, would wait for it."""
    folder = tmp_path / "weights"
    gloo1.run(save_fresh, run_config(tiny_model(), layout()), str(folder))
    for message in gloo2.run(refusal_of_one, name, str(folder)):
        assert f"cannot load {folder} into this model" in message
        assert name in message
        assert "\n" not in message


def refusal_of_one(name: str, source: str) -> str:
    """Of a model in which one parameter is twice as long."""

    def with_a_longer_one(chunks: Any) -> Any:
        sharded = sharded_weights(chunks)
        for value in sharded["model"].values():
            if value.key == name:
                longer = torch.zeros(2 * value.data.numel())
                value.data, value.local_shape, value.global_shape = (
                    longer,
                    longer.shape,
                    longer.shape,
                )
        return sharded

    with patch.object(weights, "sharded_weights", with_a_longer_one):
        return refusal(tiny_model(), source, layout(data=2))


def test_a_taken_folder_is_refused(gloo1, tmp_path):  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    (message,) = gloo1.run(_save_refused, str(tmp_path))
    assert f"{tmp_path} is not empty" in message


def _save_refused(folder: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_fresh(run_config(tiny_model(), layout()), folder)
    return str(caught.value)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        check_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        check_folder(tmp_path)
    (tmp_path / "a.distcp").write_bytes(b"12345")
    (tmp_path / "complete.json").write_text(json.dumps({"files": {"a.distcp": 6, "b": 1}}))
    with pytest.raises(CheckpointError, match=r"a\.distcp: found 5 bytes, complete\.json says 6"):
        check_folder(tmp_path)
    (tmp_path / "complete.json").write_text(json.dumps({"files": {"b": 1}}))
    with pytest.raises(CheckpointError, match="b: found None bytes"):
        check_folder(tmp_path)


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    assert weights_folder(tmp_path) == tmp_path
    for step in (3, 12):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps({"files": {}}))
    assert weights_folder(tmp_path).name == "step_00000012"
    (tmp_path / "checkpoints" / "step_00000012" / "complete.json").unlink()
    assert weights_folder(tmp_path).name == "step_00000003"
