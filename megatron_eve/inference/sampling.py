# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen: greedily, or by temperature and top-p, with a repetition penalty; each request its own.

A sampled request draws one number per token from a generator of its own and looks it up in the cumulative
distribution, so its answer does not depend on the rest of the batch. The penalty is the one of CTRL
(arXiv 1909.05858) as transformers applies it: a token that occurred in the prompt's text or in the answer has its logit
divided (or, below zero, multiplied) by it, once, however often it occurred.

Legend: R requests, W vocabulary.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eve.errors import ConfigError

SMALLEST_TEMPERATURE = 1e-6
"""A lower one changes nothing, but logits divided by it overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How to answer one request. Raises ConfigError for a senseless value, with the field's name."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    seed: int | None = None  # None: another answer each time

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0.1 <= self.repetition_penalty <= 10, "from 0.1 to 10"),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for name, is_fine, expected in checks:
            if not is_fine:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected {expected}.")

    def draws(self) -> random.Random:
        """The request's generator."""
        return random.Random(self.seed)


def next_tokens(
    logits: Tensor,
    options: Sequence[SamplingOptions],
    *,
    draws: Sequence[random.Random],
    occurred: Tensor,
) -> Tensor:
    """[R] token ids.

    Args:
        logits: [R, W] float32.
        draws: generator of each request; advanced by one number where the request samples.
        occurred: [R, W] bool, tokens that a penalty concerns. Read only where a penalty is not 1.
    """
    penalties = [one.repetition_penalty for one in options]
    if any(penalty != 1 for penalty in penalties):
        logits = penalized(logits, penalties, occurred=occurred)
    chosen = logits.argmax(-1)
    sampled = [row for row, one in enumerate(options) if one.temperature > 0]
    if sampled:
        rows = torch.tensor(sampled, device=logits.device)
        some = [options[row] for row in sampled]
        numbers = [draws[row].random() for row in sampled]
        chosen[rows] = _sample(logits[rows], some, numbers)
    return chosen


def penalized(logits: Tensor, penalties: Sequence[float], *, occurred: Tensor) -> Tensor:
    """Logits [R, W] with each row's repetition penalty applied to the tokens that occurred."""
    penalty = _column(penalties, logits)
    return torch.where(
        occurred, torch.where(logits < 0, logits * penalty, logits / penalty), logits
    )


def _sample(logits: Tensor, options: Sequence[SamplingOptions], numbers: Sequence[float]) -> Tensor:
    """Inverse of the cumulative distribution over the smallest set of tokens that holds top_p."""
    temperature = _column([max(one.temperature, SMALLEST_TEMPERATURE) for one in options], logits)
    probabilities, tokens = (
        (logits / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    )
    before = probabilities.cumsum(-1) - probabilities
    kept = before < _column([one.top_p for one in options], logits)
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    target = _column(numbers, logits) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    place = torch.minimum(place, kept.sum(-1, keepdim=True) - 1)
    return tokens.gather(-1, place)[:, 0]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    assert all(math.isfinite(value) for value in values)
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
