# SPDX-License-Identifier: Apache-2.0
"""Measured figures for a model card, out of the files that an evaluation wrote.

Two forms are read: results.json of `python -m megatron_eve.evaluation.easy_vqa`, and the aggregated JSON of lmms-eval
(`*_results.json`). Every figure keeps its name; nothing is renamed, averaged or rounded to look better (four
decimals)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number."""

    task: str
    metric: str
    value: float
    num_questions: int | None


def read_results(path: Path) -> list[Figure]:
    """All figures of one file. Raises: DataError if it is of neither form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} not found; give a results file of an evaluation.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give a results file.") from error
    try:
        if isinstance(content, dict) and isinstance(content.get("rows"), list):
            return [_demo_figure(row) for row in content["rows"]]
        if isinstance(content, dict) and isinstance(content.get("results"), dict):
            return _lmms_figures(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} is no results file: {type(error).__name__}: {error}; give one as the evaluation wrote it."
        ) from error
    raise DataError(
        f"{path} holds neither `rows` (megatron_eve.evaluation.easy_vqa) nor `results` (lmms-eval); give a file of "
        "one of them."
    )


def _demo_figure(row: dict[str, Any]) -> Figure:
    return Figure(
        task=f"easy-VQA: {row['name']}",
        metric="exact match",
        value=float(row["right_image"]),
        num_questions=int(row["num_questions"]),
    )


def _lmms_figures(content: dict[str, Any]) -> list[Figure]:
    """`METRIC,FILTER` keys with a number; standard errors and aliases are left out."""
    samples = content.get("n-samples", {})
    figures = []
    for task, values in content["results"].items():
        for key, value in values.items():
            metric = key.split(",")[0]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if "," not in key or not is_number or "_stderr" in metric:
                continue
            number = samples.get(task, {}).get("effective")
            figures.append(
                Figure(task=task, metric=metric, value=float(value), num_questions=number)
            )
    return figures
