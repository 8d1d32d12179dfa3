# SPDX-License-Identifier: Apache-2.0
"""A released folder and pictures for the inference tests."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.tokenizer import train_bpe
from megatron_eve.inference.engine import Engine
from tests.checkpoints_convert.conftest import CORPUS, release_model, write_reference_release
from tests.support.reference_eve import build_reference
from tests.support.tiny import ALL


@pytest.fixture(scope="session")
def released_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in a released folder."""
    base = tmp_path_factory.mktemp("inference")
    train_bpe(CORPUS * 3, base / "bpe", 320)
    eve = build_reference(release_model(ALL, base / "bpe"), seed=4)
    return write_reference_release(base / "eve", eve, base / "bpe")


@pytest.fixture(scope="session")
def engine(released_folder: Path) -> Engine:
    """The released folder, loaded."""
    return Engine.load(released_folder, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four images of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, (width, height) in enumerate(((8, 8), (16, 4), (5, 11), (30, 30))):
        noise = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths
