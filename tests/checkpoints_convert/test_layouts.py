# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a run saves in any layout become the same released file, to the byte."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.hf_config import model_json
from checkpoints_convert.hf_folder import write_safetensors
from checkpoints_convert.megatron_folder import read_megatron, refuse_damaged
from checkpoints_convert.megatron_to_hf import hf_stream
from checkpoints_convert.tensors import eve_to_hf
from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.config.schema import ModelConfig, ParallelConfig
from megatron_eve.config.text_form import config_text
from megatron_eve.training.step import train_step
from tests.checkpoints_convert.test_roundtrip import run_import
from tests.support.reference_eve import build_reference
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import (
    build_all,
    global_batch,
    packs_of_rank,
    read_weights,
    run_config,
)

LAYOUTS = {
    "one": layout(),
    "tp2": layout(tensor=2),
    "tp2-sp": layout(tensor=2, sequence_parallel=True),
    "pp2": layout(pipeline=2),
    "pp2-virtual": layout(pipeline=2, virtual=2),
    "cp2": layout(context=2),
    "dp2": layout(data=2, distributed_optimizer=True),
    "tp2-pp2": layout(tensor=2, pipeline=2),
    "tp2-pp2-virtual-sp": layout(tensor=2, pipeline=2, virtual=2, sequence_parallel=True),
    "tp2-cp2": layout(tensor=2, context=2),
    "tp2-dp2": layout(tensor=2, data=2, distributed_optimizer=True),
    "pp2-cp2": layout(pipeline=2, context=2),
    "pp4": layout(pipeline=4),
    "cp2-dp2": layout(context=2, data=2, distributed_optimizer=True),
}


SLOW = ("tp2-pp2-virtual-sp", "tp2-cp2", "pp2-cp2", "pp4", "cp2-dp2")
"""Nine others run with every change."""

TIED = ("tp2", "pp2-virtual", "tp2-pp2")
"""Tied weights differ from untied ones at the ends of the pipeline and in the vocabulary only."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What the runs start from: a Hugging Face folder, and the distributed checkpoint made of it."""

    model: ModelConfig
    hf: Path
    megatron: Path


def train_and_save(
    start: Start, parallel: ParallelConfig, run_dir: Path, *, steps: int, rate: float
) -> None:
    """In workers: start from the weights, train, save everything that a run saves."""
    rates = {"peak_lr": rate, "patch_embedding_lr": rate, "min_lr": 0.0, "warmup_fraction": 0.0}
    config = run_config(start.model, parallel, optim=rates)
    training, state = build_all(config, weights=str(start.megatron))
    wrapped, optimizer = training.wrapped, training.optimizer
    schedule = training.schedule
    packs = packs_of_rank(global_batch(2), config=config, state=state)
    for _ in range(steps):
        train_step(
            wrapped,
            packs,
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
    manager = CheckpointManager(run_dir, keep_last=1, config_text=config_text(config))
    manager.save(training, step=steps, data={})


def export_weights(run_dir: Path, dest: Path) -> None:
    """In a worker: only the weights, compared as before a release, whose other files need a tokenizer."""
    dest.mkdir()
    weights = read_megatron(run_dir)
    refuse_damaged(weights)
    write_safetensors(dest, hf_stream(weights))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory, gloo1: Any) -> dict[bool, Start]:
    """By whether embedding and output layer are tied. Tensor parallelism pads the vocabulary."""
    made = {}
    for tied in (False, True):
        model = tiny_model(tied=tied)
        assert model.vocab_size % 2 == 1
        folder = tmp_path_factory.mktemp("layouts")
        (folder / "hf").mkdir()
        write_safetensors(folder / "hf", build_reference(model, seed=4).state_dict().items())
        config = model_json(model, dtype="float32", eos_id=1, pad_id=0, image_edge=16, run=None)
        (folder / "hf/config.json").write_text(json.dumps(config))
        made[tied] = Start(model, folder / "hf", folder / "megatron")
        assert gloo1.run(run_import, folder / "hf", folder / "megatron") == ["fp32"]
    return made


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        pytest.param(name, False, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in LAYOUTS
    ]
    + [(name, True) for name in TIED],
)
def test_a_run_in_any_layout_is_released_to_the_byte(
    name: str, tied: bool, starts: dict[bool, Start], tmp_path: Path, request: Any, gloo1: Any
) -> None:
    """A step at learning rate zero moves no weight, and the optimizer has its state."""
    parallel = LAYOUTS[name]
    pool = request.getfixturevalue(f"gloo{parallel.world_size}")
    pool.run(train_and_save, starts[tied], parallel, tmp_path / "run", steps=1, rate=0.0)
    gloo1.run(export_weights, tmp_path / "run", tmp_path / "back")
    expected = (starts[tied].hf / "model.safetensors").read_bytes()
    assert (tmp_path / "back/model.safetensors").read_bytes() == expected


def test_what_a_run_trained_is_what_megatron_loads(
    starts: dict[bool, Start], tmp_path: Path, gloo1: Any, gloo2: Any
) -> None:
    """Our reader of the format against megatron-core's, on weights that three steps have changed."""
    start, parallel = starts[False], layout(tensor=2, sequence_parallel=True)
    gloo2.run(train_and_save, start, parallel, tmp_path / "run", steps=3, rate=1e-3)
    gloo1.run(export_weights, tmp_path / "run", tmp_path / "back")
    (loaded,) = gloo1.run(read_weights, start.model, str(tmp_path / "run"))
    found = load_file(tmp_path / "back/model.safetensors")
    expected = eve_to_hf(loaded, start.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before = load_file(start.hf / "model.safetensors")
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) > len(found) / 2
