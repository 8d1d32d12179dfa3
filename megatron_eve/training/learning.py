# SPDX-License-Identifier: Apache-2.0
"""Whether a run can learn: each group of weights that its stage trains gets a gradient and has a learning rate, and
there are labels. A run that lacks one of these looks like any other, saves, and ends as done; this module warns.

Each process finds which groups a gradient reaches, and the step's own all-reduce adds that up (step.py). Only steps
in a row count: a single batch without a picture is nothing unusual."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from megatron_eve.config.schema import StageConfig, TrainableGroup
from megatron_eve.model.stages import group_of

GROUPS: tuple[TrainableGroup, ...] = get_args(TrainableGroup)
STEPS_IN_A_ROW = 3
"""The first warning comes after so many steps, the next after ten times as many, and so on."""
SMALLEST_RATE = 1e-12
"""Below it a step of Adam changes no weight in fp32 that is not far smaller than any initial one."""

_LOOK_AT = 2**12  # elements of a gradient: the first rows are enough
_LOG = logging.getLogger(__name__)


def reached_groups(chunks: Iterable[torch.nn.Module], *, device: torch.device) -> Tensor:
    """[len(GROUPS)] float64: 1 where this process holds a gradient other than zero. Call it after the backward."""
    gradients: dict[TrainableGroup, list[Tensor]] = {group: [] for group in GROUPS}
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                gradients[group_of(name)].append(_main_grad(param).view(-1)[:_LOOK_AT])
    reached = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    for index, group in enumerate(GROUPS):
        if gradients[group]:
            largest = torch.stack(torch._foreach_norm(gradients[group], math.inf)).max()
            reached[index] = largest != 0  # NaN is not: non_finite.py reports it
    return reached


def _main_grad(param: Any) -> Tensor:
    """The attribute that megatron-core's DistributedDataParallel adds."""
    gradient: Tensor = param.main_grad
    return gradient


class LearningWatch:
    """Counts steps in a row that teach nothing, and warns."""

    def __init__(self, stage: StageConfig) -> None:
        self._stage = stage
        self._in_a_row: dict[str, int] = {}
        self._next: dict[str, int] = {}
        self._last: dict[str, str] = {}
        self._steps = 0

    def count(self, metrics: Mapping[str, float], *, reached: Sequence[TrainableGroup]) -> None:
        """Call it after each step, with its metrics and the groups that its gradient reached."""
        if metrics["skipped"]:
            return
        self._steps += 1
        problems = self._problems(metrics, reached)
        self._in_a_row = {what: self._in_a_row.get(what, 0) + 1 for what in problems}
        for what, why in problems.items():
            due = self._next.get(what, STEPS_IN_A_ROW)
            if self._in_a_row[what] >= due:
                self._next[what] = 10 * due
                self._say(what, why)
        self._last = problems

    def finish(self) -> None:
        """Warn at the end of a run that was too short for count()."""
        for what, steps in self._in_a_row.items():
            if steps == self._steps and what not in self._next:
                self._say(what, self._last[what])

    def _say(self, what: str, why: str) -> None:
        steps = self._in_a_row[what]
        _LOG.warning("warning: %s in %d steps in a row: %s", what, steps, why)

    def _problems(
        self, metrics: Mapping[str, float], reached: Sequence[TrainableGroup]
    ) -> dict[str, str]:
        """What is missing -> why, and what to look at. Without labels there is no gradient either: one warning."""
        found: dict[str, str] = {}
        for group in self._stage.trainable:
            rate = _rate(metrics, group)
            if rate < SMALLEST_RATE:
                key = "optim.patch_embedding_lr" if group == "patch_embedding" else "optim.peak_lr"
                found[f"{group} had a learning rate of {rate:g}"] = (
                    f"its weights do not change; look at {key}, optim.min_lr, optim.warmup_fraction and train.steps"
                )
        if not metrics["label_tokens"]:
            return found | {
                "no token had a label": "nothing is learned; the answers of these samples are masked or cut away: look "
                "at data.max_text_tokens, data.template, RUN_DIR/quarantine.jsonl and `megatron-eve data inspect`"
            }
        for group in self._stage.trainable:
            if group not in reached:
                found[f"{group} is trained but got no gradient"] = _why(metrics, group)
        return found


def _why(metrics: Mapping[str, float], group: TrainableGroup) -> str:
    if group != "text" and not metrics["vision_tokens"]:
        return (
            "the samples hold no picture; look at data.sources, or train another stage on this data"
        )
    return "the loss does not depend on it; look at the weights that it was given and at stage.trainable"


def _rate(metrics: Mapping[str, float], group: TrainableGroup) -> float:
    """The learning rate of the step. A pipeline stage may hold no weight of a group."""
    own = metrics.get("patch_embedding_lr") if group == "patch_embedding" else None
    return metrics["lr"] if own is None else own
