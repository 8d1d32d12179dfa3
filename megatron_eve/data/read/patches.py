# SPDX-License-Identifier: Apache-2.0
"""An image cut into the rows that the patch embedding multiplies.

Legend: p patch_stride (16), d dense_stride (2), e = p * d pixels edge of a token, P tokens of an image.
The official Conv2d(p, stride p) - GELU - Conv2d(d, stride d) sees non-overlapping windows, so it equals two matmuls:
rows [P, d*d, 3*p*p] @ conv1.weight.view(C, 3*p*p).T, GELU, then [P, d*d*C] @ conv2.weight permuted to [h, d*d*C]
(`permute(0, 2, 3, 1)`). tests/data/test_patches.py holds both against the convolutions.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_eve.errors import DataError


def patchify(
    image_HWC: NDArray[np.uint8],
    *,
    patch_stride: int = 16,
    dense_stride: int = 2,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Rows of an image in reading order of its tokens.

    Shapes: image_HWC [H, W, 3], H and W multiples of e -> [P, d*d, 3*p*p]; of token P the d*d squares of p * p pixels
    in reading order, each flattened channel first, as Conv2d weights are. Written to `out` (contiguous) if given.
    Raises: DataError if H or W is no multiple of e.
    """
    edge = patch_stride * dense_stride
    height, width, channels = image_HWC.shape
    if channels != 3 or height % edge or width % edge:
        raise DataError(
            f"image of shape {image_HWC.shape} cannot be cut into tokens of {edge} x {edge} pixels; "
            "resize it with train_size or eval_size first."
        )
    rows, cols = height // edge, width // edge
    grid = image_HWC.reshape(rows, dense_stride, patch_stride, cols, dense_stride, patch_stride, 3)
    patches = grid.transpose(0, 3, 1, 4, 6, 2, 5)  # row, col, sub-row, sub-col, channel, y, x
    if out is None:
        out = np.empty((rows * cols, dense_stride**2, 3 * patch_stride**2), np.uint8)
    out.reshape(patches.shape)[...] = patches
    return out
