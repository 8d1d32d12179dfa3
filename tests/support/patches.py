# SPDX-License-Identifier: Apache-2.0
"""The way back from patches to a picture."""

import numpy as np
from numpy.typing import NDArray


def unpatchify(
    patches: NDArray[np.uint8], *, rows: int, patch_stride: int = 16, dense_stride: int = 2
) -> NDArray[np.uint8]:
    """The image [H, W, 3] whose rows `patchify` gave; to look at a batch."""
    cols = patches.shape[0] // rows
    grid = patches.reshape(rows, cols, dense_stride, dense_stride, 3, patch_stride, patch_stride)
    image = grid.transpose(0, 2, 5, 1, 3, 6, 4)
    edge = patch_stride * dense_stride
    return np.ascontiguousarray(image).reshape(rows * edge, cols * edge, 3)
