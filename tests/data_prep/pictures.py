# SPDX-License-Identifier: Apache-2.0
"""Encoded pictures and small data sets for the tests of data_prep."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def noise(height: int = 40, width: int = 60, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture that compresses badly, so that damage in the middle hits data."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def with_orientation(
    image: Image.Image, file_format: str, orientation: int, **options: Any
) -> bytes:
    """The picture with an EXIF orientation tag (6: stored rotated by 90 degrees)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, file_format, exif=exif, **options)


def sample(name: str, image: object = None, *turns: str, **fields: object) -> dict[str, object]:
    """An EVE/LLaVA sample; `turns` alternate human and gpt; by default one question and one answer."""
    marks = "<image>\n" * (len(image) if isinstance(image, list) else image is not None)
    texts = turns or (f"{marks}What is it?", "A picture.")
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    entry: dict[str, object] = {"id": name, "conversations": conversation}
    return entry | ({} if image is None else {"image": image}) | fields


def write_dataset(folder: Path, *, num_samples: int, size: int = 48) -> Path:
    """A JSON file and JPEG files below `folder`: every fifth sample has no image, every seventh one is bad."""
    (folder / "images").mkdir(parents=True)
    samples = []
    for number in range(num_samples):
        name = f"images/{number}.jpg"
        (folder / name).write_bytes(encode(noise(size, size + number % 9, seed=number), "JPEG"))
        if number % 7 == 3:
            samples.append(sample(f"bad-{number}", f"images/missing-{number}.jpg"))
        elif number % 5 == 0:
            samples.append(sample(f"text-{number}"))
        else:
            samples.append(sample(f"image-{number}", name))
    path = folder / "data.json"
    path.write_text(json.dumps(samples))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file, the lock aside."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
