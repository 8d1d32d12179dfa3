# SPDX-License-Identifier: Apache-2.0
"""The official resize rules, vector by vector, and the guard."""

import pytest

from megatron_eve.data.read.image_size import check_image_size, eval_size, train_size
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.sample import image_token_count

# (width, height) of the image: (width, height, tokens) for training at 800 and 1600, evaluation at 1600
VECTORS = {
    (640, 480): ((640, 480, 316), (640, 480, 316), (1856, 1408, 2597)),
    (336, 336): ((320, 320, 111), (320, 320, 111), (1600, 1600, 2551)),
    (800, 800): ((800, 800, 651), (800, 800, 651), (1600, 1600, 2551)),
    (1024, 768): ((928, 704, 661), (1024, 768, 793), (1856, 1408, 2597)),
    (1920, 1080): ((1056, 608, 647), (1920, 1088, 2075), (2144, 1216, 2585)),
    (3000, 4000): ((704, 928, 668), (1376, 1856, 2553), (1408, 1856, 2611)),
    (2000, 500): ((1600, 384, 613), (1984, 512, 1009), (3200, 800, 2526)),
    (5000, 1000): ((1792, 352, 628), (3584, 704, 2487), (3584, 736, 2600)),
    (48, 48): ((64, 64, 7), (64, 64, 7), (1600, 1600, 2551)),
    (80, 80): ((64, 64, 7), (64, 64, 7), (1600, 1600, 2551)),
    (112, 112): ((128, 128, 21), (128, 128, 21), (1600, 1600, 2551)),
    (16, 16): ((32, 32, 3), (32, 32, 3), (1600, 1600, 2551)),
    (1, 1): ((32, 32, 3), (32, 32, 3), (1600, 1600, 2551)),
    (4000, 40): ((4000, 32, 127), (4000, 32, 127), (16000, 160, 2506)),
}


@pytest.mark.parametrize(("width", "height"), VECTORS)
def test_official_vectors(width: int, height: int) -> None:
    rules = (
        train_size(height, width, edge=800),
        train_size(height, width, edge=1600),
        eval_size(height, width, edge=1600),
    )
    found = tuple((w, h, image_token_count(h, w)) for h, w in rules)
    assert found == VECTORS[width, height]


def test_training_never_exceeds_the_official_worst_case() -> None:
    worst = 0
    for width in range(32, 8000, 37):
        height = max(width // 2, 1)
        h, w = train_size(height, width, edge=1600)
        worst = max(worst, (h // 32) * (w // 32))
    assert worst <= 2550  # reference grid search, aspect ratio <= 2


@pytest.mark.parametrize(
    ("height", "width", "reason"),
    [
        (0, 10, "bad_image_size"),
        (60_000, 60_000, "too_many_pixels"),
        (1, 100_000, "aspect_ratio"),
        (1000, 9, "aspect_ratio"),
    ],
)
def test_guard_refuses(height: int, width: int, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        check_image_size(height, width, max_aspect_ratio=100)
    assert error.value.reason == reason
    assert f"{height} x {width}" in error.value.message


def test_guard_lets_the_limit_itself_pass() -> None:
    check_image_size(100, 10_000, max_aspect_ratio=100)
