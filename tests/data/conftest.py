# SPDX-License-Identifier: Apache-2.0
"""What the data tests share: the real Qwen2.5 tokenizer, encoded images, and small folders of MDS shards."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.tokenizer import build_qwen25
from megatron_eve.config.schema import DataConfig, ModelConfig, ShardSource, SplitConfig
from megatron_eve.data.read.row import MDS_COLUMNS, to_row
from megatron_eve.data.read.streaming_import import MDSWriter
from megatron_eve.data.read.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.data.sample import Sample, Turn


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the Qwen2.5 tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen2.5"
    build_qwen25(folder)
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Tokenizer:
    return load_tokenizer(qwen_folder)


def smooth_image(height: int, width: int, *, seed: int) -> Image.Image:
    """A photograph-like picture: low-frequency noise, so that JPEG and resizing behave as on real images."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    fine = rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + fine, 0, 255).astype(np.uint8))


def encode_image(image: Image.Image, *, format: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def make_sample(number: int, *, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> Sample:
    """A valid sample for both templates; one JPEG per (height, width) in `sizes`."""
    marks = "<image>" * len(sizes)
    return Sample(
        id=f"sample-{number:05d}",
        images=tuple(encode_image(smooth_image(*size, seed=number)) for size in sizes),
        image_sizes=tuple(sizes),
        turns=(
            Turn("human", f"{marks}\nWhat is it?" if marks else f"What is number {number}?"),
            Turn("gpt", f"It is number {number}." + " And more." * (number % 7)),
        ),
        source="test",
    )


def mixed_samples(count: int, *, start: int = 0) -> list[Sample]:
    """Text-only, single-image and two-image samples of several sizes."""
    rng = np.random.default_rng(start)
    samples = []
    for number in range(start, start + count):
        num_images = int(rng.choice([0, 1, 1, 1, 2]))
        sizes = [(int(h), int(w)) for h, w in rng.integers(30, 130, (num_images, 2))]
        samples.append(make_sample(number, sizes=sizes))
    return samples


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails is tried once more, at once."""
    monkeypatch.setattr("megatron_eve.data.read.reading.PAUSES_S", (0.0,))


WriteShards = Callable[..., Path]


@pytest.fixture
def write_shards(tmp_path: Path) -> WriteShards:
    """write_shards(name, samples, shard_bytes=...) -> folder of MDS shards."""

    def write(name: str, samples: Sequence[Sample], *, shard_bytes: int = 15_000) -> Path:
        folder = tmp_path / name
        with MDSWriter(
            out=str(folder), columns=MDS_COLUMNS, hashes=["xxh3_64"], size_limit=shard_bytes
        ) as writer:
            for sample in samples:
                writer.write(to_row(sample))
        return folder

    return write


def data_config(folders: Sequence[Path], *, tokenizer: Path, **changes: object) -> DataConfig:
    """A small data configuration over shard folders; `proportions` weights the sources."""
    proportions = changes.pop("proportions", [1.0] * len(folders))
    assert isinstance(proportions, list)
    config = DataConfig(
        sources=tuple(
            ShardSource(path=str(folder), proportion=proportion)
            for folder, proportion in zip(folders, proportions, strict=True)
        ),
        tokenizer=str(tokenizer),
        template="qwen2",
        image_edge=128,
        max_aspect_ratio=10.0,
        max_text_tokens=200,
        pack_tokens=256,
        align=16,
        sample_align=1,
        open_bins=4,
        shuffle_block_size=256,
        num_workers=0,
        prefetch_steps=2,
        seed=3,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=151_680,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    init_std=0.02,
    split=SplitConfig(norm=True, attention=True, ffn=True),
    patch_stride=16,
    dense_stride=2,
    patch_embed_dim=32,
)
