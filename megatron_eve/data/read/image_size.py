# SPDX-License-Identifier: Apache-2.0
"""The size to which an image is resized: the official rule of training, the official rule of evaluation, the guard.

The two rules differ (and both exist because released numbers depend on each): training caps the area at edge * edge
and never enlarges, then rounds half to even; evaluation always scales to that area, then rounds up.
Sources: EVEv2 train.py:349-363 and eve/mm_utils.py:16-32. All sizes are (height, width) in pixels.
"""

import math

from megatron_eve.data.read.quarantine import SampleError

PIXELS_PER_TOKEN = 32
"""Edge of the square that one vision token covers in every released EVEv2 model."""
MAX_IMAGE_PIXELS = 120_000_000
"""Largest image that is decoded at all: 0.36 GB as RGB. The default limit of data_prep."""


def train_size(
    height: int, width: int, *, edge: int, pixels_per_token: int = PIXELS_PER_TOKEN
) -> tuple[int, int]:
    """Training: cap the area at edge * edge, then round half to even to whole tokens, at least one."""
    ratio = max(math.sqrt(width * height) / edge, 1.0)
    return (
        max(round(height / ratio / pixels_per_token), 1) * pixels_per_token,
        max(round(width / ratio / pixels_per_token), 1) * pixels_per_token,
    )


def eval_size(
    height: int, width: int, *, edge: int, pixels_per_token: int = PIXELS_PER_TOKEN
) -> tuple[int, int]:
    """Evaluation: scale the area to edge * edge, then round up to whole tokens."""
    ratio = math.sqrt(width * height) / edge
    return (
        math.ceil(height / ratio / pixels_per_token) * pixels_per_token,
        math.ceil(width / ratio / pixels_per_token) * pixels_per_token,
    )


def check_image_size(height: int, width: int, *, max_aspect_ratio: float) -> None:
    """Raises SampleError for an image that must not be decoded or trained on."""
    if height < 1 or width < 1:
        raise SampleError("bad_image_size", f"image is {height} x {width} pixels (height x width)")
    if height * width > MAX_IMAGE_PIXELS:
        raise SampleError(
            "too_many_pixels", f"image is {height} x {width}, limit {MAX_IMAGE_PIXELS:,} pixels"
        )
    ratio = max(height, width) / min(height, width)
    if ratio > max_aspect_ratio:
        raise SampleError(
            "aspect_ratio",
            f"image is {height} x {width}, ratio {ratio:.1f}, limit {max_aspect_ratio:g}",
        )
