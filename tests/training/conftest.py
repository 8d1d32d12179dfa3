# SPDX-License-Identifier: Apache-2.0
"""A small data set that went through the public commands, and a tiny recipe on it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200)}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `shards` (60 samples: images of several sizes, every fifth without) and `tokenizer`."""
    folder = tmp_path_factory.mktemp("small-data")
    (folder / "images").mkdir()
    rows = []
    for number in range(60):
        name = list(COLOURS)[number % 3]
        size = (32 + 32 * (number % 3), 64)
        row: dict[str, object] = {"id": f"sample-{number}"}
        mark = ""
        if number % 5:
            Image.new("RGB", size, COLOURS[name]).save(folder / "images" / f"{number}.png")
            row["image"] = f"{number}.png"
            mark = "<image>\n"
        row["conversations"] = [
            {"from": "human", "value": f"{mark}What colour is number {number}?"},
            {"from": "gpt", "value": f"It is {name}."},
        ]
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    arguments = [str(folder / "data.json"), str(folder / "images"), str(folder / "shards")]
    assert data_prep(["build-shards", *arguments, "--workers", "1"]) == 0
    arguments = [str(folder / "data.json"), str(folder / "tokenizer"), "--vocab-size", "300"]
    assert data_prep(["tokenizer", "train", *arguments]) == 0
    return folder


@pytest.fixture
def overrides(small_data: Path, tmp_path: Path) -> list[str]:
    """Makes eve_tiny_stage3 a run of seconds in this test's own folder, in one process, from random weights."""
    return [
        f"run_dir={tmp_path / 'run'}",
        f"data.sources.0.path={small_data / 'shards'}",
        f"data.tokenizer={small_data / 'tokenizer'}",
        "data.template=qwen2",
        "data.image_edge=96",
        "data.max_text_tokens=250",
        "data.pack_tokens=512",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "model.head_dim=8",
        "batch.size=2",
        "parallel.gpus_per_node=1",
        "parallel.tensor=1",
        "parallel.sequence_parallel=false",
        "checkpoint.load_weights_from=none",
        "checkpoint.save_every_steps=4",
        "logging.every_steps=1",
        "train.steps=12",
    ]
