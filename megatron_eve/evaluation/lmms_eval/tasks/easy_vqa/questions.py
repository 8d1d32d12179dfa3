# SPDX-License-Identifier: Apache-2.0
"""Functions that easy_vqa.yaml names. A record is {id, image, question, answer, type}; answers are judged and grouped
as `python -m megatron_eve.evaluation.easy_vqa` does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from megatron_eve.data.read.pixels import rgb_pixels
from megatron_eve.evaluation.scoring import GROUPS, normalised

EASY_VQA = Path("runs/demo/data/easy-vqa")  # as in easy_vqa.yaml
METRICS = {"shape": "shape", "color": "color", "open (shape and color)": "open", "yes/no": "yes_no"}
"""Group of megatron_eve.evaluation.scoring -> metric of the yaml file."""


def images(record: Mapping[str, str]) -> list[Image.Image]:
    """The one image of the question."""
    with Image.open(EASY_VQA / record["image"]) as image:
        return [rgb_pixels(image)]


def text(record: Mapping[str, str]) -> str:
    """The question as it stands: the model was trained on these without a suffix."""
    return record["question"]


def results(record: Mapping[str, str], answers: Sequence[str]) -> dict[str, float]:
    """1 or 0 for each metric that the question belongs to."""
    right = float(normalised(answers[0]) == normalised(record["answer"]))
    return {METRICS[group]: right for group, types in GROUPS.items() if record["type"] in types}


def share(rights: Sequence[float]) -> float:
    """Share of right answers."""
    return sum(rights) / len(rights)
