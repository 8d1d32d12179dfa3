# SPDX-License-Identifier: Apache-2.0
"""The one place that says what a picture's pixels are, and its copy in the release."""

import ast
import inspect
import sys

import numpy as np
import pytest
from PIL import Image

from checkpoints_convert.hf import pixels_eve
from megatron_eve.data.read import pixels
from megatron_eve.data.read.pixels import UnsupportedPixelsError, rgb_pixels, turn_of, turned_size
from tests.repo.tree import python_files, text_of


def test_the_release_carries_the_same_text() -> None:
    assert inspect.getsource(pixels_eve) == inspect.getsource(pixels)


def test_it_needs_nothing_that_a_release_lacks() -> None:
    names = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(inspect.getsource(pixels)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert names - set(sys.stdlib_module_names) == {"numpy", "PIL"}


def test_nobody_else_turns_or_converts() -> None:
    """No other file of the product reads an orientation, turns, or makes RGB of what a user's file holds.

    Tools do, with pictures whose kind they know."""
    own = {"megatron_eve/data/read/pixels.py", "checkpoints_convert/hf/pixels_eve.py"}
    words = ("exif_transpose", "getexif", "0x0112", ".transpose(Image", 'convert("RGB")')
    found = {
        (path, word)
        for path in python_files(tests=False)
        if path not in own and not path.startswith("tools/") and "PIL" in text_of(path)
        for word in words
        if word in text_of(path)
    }
    assert found == set()


@pytest.mark.parametrize(
    ("mode", "dtype"), [("I;16", np.uint16), ("I;16B", ">u2"), ("I", np.int32), ("F", np.float32)]
)
def test_deep_pixels_are_scaled_or_refused(mode: str, dtype: str) -> None:
    levels = np.array([[0, 128, 129, 32_768, 65_535]], dtype)
    image = Image.frombytes(mode, (5, 1), levels.tobytes())
    if mode in ("I", "F"):
        with pytest.raises(UnsupportedPixelsError, match="scale them to 8 bits yourself"):
            rgb_pixels(image)
        return
    expected = [0, 0, 1, 128, 255]
    assert np.asarray(rgb_pixels(image))[0, :, 0].tolist() == expected


def test_metadata_of_an_image_in_memory_count_too() -> None:
    """What a user of the release hands over: opened by him, perhaps changed, not from our reader."""
    image = Image.new("RGB", (30, 20))
    image.getexif()[0x0112] = 6
    turn = turn_of(image, exif_rotation=True)
    assert turned_size(image, turn) == (30, 20)
    assert turn_of(image, exif_rotation=False) is None
