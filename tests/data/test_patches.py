# SPDX-License-Identifier: Apache-2.0
"""Patch rows: the two-matmul form equals the official convolutions; order and inverse."""

import numpy as np
import pytest
import torch

from megatron_eve.data.read.patches import patchify
from megatron_eve.errors import DataError
from tests.support.patches import unpatchify


@pytest.mark.parametrize(("patch_stride", "dense_stride"), [(16, 2), (8, 4), (5, 1)])
def test_two_matmuls_equal_two_convolutions(patch_stride: int, dense_stride: int) -> None:
    torch.manual_seed(0)
    channels, hidden, rows, cols = 7, 11, 3, 4
    edge = patch_stride * dense_stride
    conv1 = torch.nn.Conv2d(3, channels, patch_stride, patch_stride).double()
    conv2 = torch.nn.Conv2d(channels, hidden, dense_stride, dense_stride).double()
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (rows * edge, cols * edge, 3), dtype=np.uint8)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1).double()
        expected = (
            conv2(torch.nn.functional.gelu(conv1(pixels))).permute(1, 2, 0).reshape(-1, hidden)
        )
        patches = patchify(image, patch_stride=patch_stride, dense_stride=dense_stride)
        first = torch.from_numpy(patches).double() @ conv1.weight.view(channels, -1).T + conv1.bias
        kernel = conv2.weight.permute(0, 2, 3, 1).reshape(hidden, -1)
        found = torch.nn.functional.gelu(first).flatten(1) @ kernel.T + conv2.bias
    assert patches.shape == (rows * cols, dense_stride**2, 3 * patch_stride**2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_order_of_one_row() -> None:
    image = np.arange(64 * 96 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 96, 3)
    patches = patchify(image)
    token = image[32:64, 64:96]  # second row, third column
    for square, (y, x) in enumerate(((0, 0), (0, 16), (16, 0), (16, 16))):
        expected = token[y : y + 16, x : x + 16].transpose(2, 0, 1).reshape(-1)
        np.testing.assert_array_equal(patches[5, square], expected)


def test_inverse() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 160, 3), dtype=np.uint8)
    np.testing.assert_array_equal(unpatchify(patchify(image), rows=2), image)


def test_size_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(DataError, match=r"shape \(64, 100, 3\) cannot be cut .* 32 x 32"):
        patchify(np.zeros((64, 100, 3), np.uint8))
