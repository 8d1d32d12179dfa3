# SPDX-License-Identifier: Apache-2.0
"""What the conversion tests share: a small tokenizer, and released folders made from the reference model."""

import dataclasses
from pathlib import Path

import pytest

from checkpoints_convert.automodel_layout import Release, write_release
from data_prep.tokenizer import train_bpe
from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.data.read.tokenizer import load_tokenizer
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import tiny_model

CORPUS = [
    "What colour is the circle? red green blue yellow black",
    "A red circle above a blue square. How many shapes are there? two three four",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BPE in the files of a Hugging Face tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_bpe(CORPUS * 3, folder, 320)
    return folder


def release_model(split: SplitConfig, tokenizer: Path, *, tied: bool = False) -> ModelConfig:
    """tests/support/tiny.py's model with the tokenizer's vocabulary and a few rows more."""
    rows = load_tokenizer(tokenizer).vocab_size + 3
    return dataclasses.replace(tiny_model(split, tied=tied, layers=2), vocab_size=rows)


def write_reference_release(
    folder: Path, eve: ReferenceEve, tokenizer: Path, *, image_edge: int = 16, **options: int
) -> Path:
    """The reference model's weights as a released folder."""
    release = Release(
        model=eve.config,
        dtype="float32",
        tokenizer=tokenizer,
        image_edge=image_edge,
        run=None,
        origin="the reference model of the tests",
    )
    write_release(folder, release, eve.state_dict().items(), **options)
    return folder


@pytest.fixture(scope="session")
def full_release(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> tuple[Path, ReferenceEve]:
    """A released folder with every component split, and the reference model that it holds."""
    split = SplitConfig(norm=True, attention=True, ffn=True)
    eve = build_reference(release_model(split, tokenizer_folder), seed=3).eval()
    folder = tmp_path_factory.mktemp("release") / "eve"
    return write_reference_release(folder, eve, tokenizer_folder), eve
