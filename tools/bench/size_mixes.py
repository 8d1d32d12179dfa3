# SPDX-License-Identifier: Apache-2.0
"""Made-up lengths of realistic samples: how many vision and text tokens a training set of each stage may have.

Image areas are log-normal, as in web-crawled sets, or a mixture with the sizes of known sets (Segment Anything: about
2250 x 1500 pixels, OpenImages: longest edge 1024); aspect ratios are log-normal; the official train-time rule caps
the area. Text is log-normal, cut where the recipe cuts it. No set was measured: medians and spreads are assumptions,
written down here. The stress mixes are harder than any of the recipes is expected to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.recipes import load_recipe
from megatron_eve.data.read.image_size import train_size
from megatron_eve.data.sample import image_token_count

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Areas:
    """Log-normal image areas in pixels before the resize, and their share of a mix."""

    share: float
    median: float
    sigma: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeMix:
    """A training set's sizes. `recipe` gives area cap, text limit, pack size and what is trained."""

    recipe: str
    areas: tuple[Areas, ...]
    text_median: float
    text_sigma: float
    text_range: tuple[int, int]  # the upper end is at most the recipe's max_text_tokens
    text_only: float  # share of samples without an image


_WEB = Areas(share=1.0, median=0.35e6, sigma=0.9)
_SEGMENT_ANYTHING = Areas(share=0.3, median=2250 * 1500, sigma=0.05)
_OPEN_IMAGES = Areas(share=0.15, median=1024 * 720, sigma=0.1)
# Seventy parts web, twenty documents and screens, ten thumbnails.
_QUESTIONS = (
    Areas(share=0.7, median=0.35e6, sigma=0.9),
    Areas(share=0.2, median=3e6, sigma=0.5),
    Areas(share=0.1, median=4e4, sigma=0.6),
)


def _captions(recipe: str, *areas: Areas, text_median: float) -> SizeMix:
    """Pictures with captions of 10 to 200 tokens."""
    return SizeMix(
        recipe=recipe,
        areas=areas,
        text_median=text_median,
        text_sigma=0.7,
        text_range=(10, 200),
        text_only=0.0,
    )


REALISTIC: Mapping[str, SizeMix] = {
    "captions, 800^2": _captions("eve7b_stage2_1_ld", _WEB, text_median=60.0),
    "captions, 1600^2": _captions(
        "eve7b_stage2_1_hd",
        Areas(share=0.55, median=0.35e6, sigma=0.9),
        _SEGMENT_ANYTHING,
        _OPEN_IMAGES,
        text_median=90.0,
    ),
    "questions, 1600^2": SizeMix(
        recipe="eve7b_stage2_2",
        areas=_QUESTIONS,
        text_median=150.0,
        text_sigma=0.8,
        text_range=(20, 4096),
        text_only=0.05,
    ),
    "conversations, 1600^2": SizeMix(
        recipe="eve7b_stage3",
        areas=_QUESTIONS,
        text_median=330.0,
        text_sigma=0.8,
        text_range=(20, 5000),
        text_only=0.1,
    ),
}
"""One mix for each kind of stage; stage 1 has the first one's sizes."""

STRESS: Mapping[str, SizeMix] = {
    "stress: long conversations": SizeMix(
        recipe="eve7b_stage3",
        areas=_QUESTIONS,
        text_median=330.0,
        text_sigma=1.1,
        text_range=(20, 5000),
        text_only=0.15,
    ),
    "stress: every image at the cap": _captions(
        "eve7b_stage2_1_ld", Areas(share=1.0, median=4e6, sigma=0.3), text_median=60.0
    ),
}


def draw(mix: SizeMix, *, count: int, seed: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(vision tokens, text tokens) of `count` samples, each [count]."""
    data = load_recipe(mix.recipe).data
    assert mix.text_range[1] <= data.max_text_tokens, f"{mix} exceeds the recipe's limit"
    rng = np.random.default_rng(seed)
    shares = np.array([areas.share for areas in mix.areas])
    kind = rng.choice(shares.size, count, p=shares / shares.sum())
    median = np.array([areas.median for areas in mix.areas])[kind]
    sigma = np.array([areas.sigma for areas in mix.areas])[kind]
    area = median * np.exp(sigma * rng.normal(size=count))
    limit = np.log(data.max_aspect_ratio) - 0.01
    aspect = np.exp(np.clip(rng.normal(0.12, 0.38, count), -limit, limit))
    num_vision = _vision_tokens(np.sqrt(area / aspect), np.sqrt(area * aspect), data.image_edge)
    num_vision[rng.random(count) < mix.text_only] = 0
    text = mix.text_median * np.exp(mix.text_sigma * rng.normal(size=count))
    return num_vision, np.clip(text, *mix.text_range).astype(np.int32)


def _vision_tokens(heights: Values, widths: Values, edge: int) -> NDArray[np.int32]:
    sizes = (
        train_size(max(int(h), 1), max(int(w), 1), edge=edge)
        for h, w in zip(heights.tolist(), widths.tolist(), strict=True)
    )
    return np.array([image_token_count(*size) for size in sizes], np.int32)
