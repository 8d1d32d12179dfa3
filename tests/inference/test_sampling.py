# SPDX-License-Identifier: Apache-2.0
"""The choice of the next token: the distribution that transformers' processors give, and a request's own generator."""

import random

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from megatron_eve.errors import ConfigError
from megatron_eve.inference.sampling import SamplingOptions, next_tokens, penalized

WORDS = 40


def some_logits(rows: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, WORDS, generator=torch.Generator().manual_seed(seed)) * 2


def options(**values: float) -> SamplingOptions:
    return SamplingOptions(max_new_tokens=4, **values)  # type: ignore[arg-type]


class Fixed(random.Random):
    """A generator that gives a chosen number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def choose(logits: Tensor, one: SamplingOptions, number: float) -> int:
    nothing = torch.zeros_like(logits, dtype=torch.bool)
    tokens = next_tokens(logits, [one], draws=[Fixed(number)], occurred=nothing)
    return int(tokens[0])


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_sampled_shares_are_transformers_distribution(top_p: float) -> None:
    """The whole interval [0, 1) is walked in even steps, so that shares are exact to one step."""
    logits, steps = some_logits(1), 4000
    warped = TopPLogitsWarper(top_p)(None, logits / 0.7)  # type: ignore[arg-type]
    expected = warped.softmax(-1)[0]
    one = options(temperature=0.7, top_p=top_p)
    numbers = torch.arange(steps) / steps
    nothing = torch.zeros(steps, WORDS, dtype=torch.bool)
    tokens = next_tokens(
        logits.expand(steps, -1), [one] * steps, draws=[Fixed(float(n)) for n in numbers], occurred=nothing
    )  # fmt: skip
    shares = torch.bincount(tokens, minlength=WORDS) / steps
    assert float((shares - expected).abs().max()) <= 1.5 / steps
    assert not shares[expected == 0].any()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = some_logits(1) * 100
    for number in (0.0, 0.5, 0.999):
        assert choose(logits, options(temperature=temperature), number) == int(logits.argmax())


def test_the_ends_of_the_interval_are_tokens_that_are_kept() -> None:
    logits = torch.full((1, WORDS), -40.0)
    logits[0, [3, 7]] = torch.tensor([1.0, 0.0])
    assert choose(logits, options(temperature=1.0), 0.0) == 3
    assert choose(logits, options(temperature=1.0, top_p=0.99), 1 - 2**-53) == 7
    assert choose(logits, options(temperature=1.0, top_p=0.5), 1 - 2**-53) == 3


def test_repetition_penalty_is_transformers() -> None:
    logits = some_logits(3, seed=1)
    ids = torch.tensor([[1, 5, 5], [2, 0, 39], [7, 7, 7]])
    occurred = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)  # type: ignore[arg-type]
    assert torch.equal(penalized(logits, [1.3] * 3, occurred=occurred), expected)
    assert (expected != logits).any()


def test_rows_have_their_own_options() -> None:
    """Greedy, penalised and sampled side by side choose what each chooses alone."""
    logits = some_logits(1, seed=2).expand(4, -1).clone()
    best = int(logits[0].argmax())
    occurred = torch.zeros_like(logits, dtype=torch.bool)
    occurred[:, best] = True
    mixed = [
        options(),
        options(repetition_penalty=10.0),
        options(temperature=5.0),
        options(temperature=0.0),
    ]
    together = next_tokens(logits, mixed, draws=[Fixed(0.9)] * 4, occurred=occurred).tolist()
    alone = [
        int(next_tokens(logits[:1], [one], draws=[Fixed(0.9)], occurred=occurred[:1])[0])
        for one in mixed
    ]
    assert together == alone
    assert together[0] == together[3] == best
    assert best not in together[1:3]


def test_a_seed_gives_the_same_numbers() -> None:
    again = [SamplingOptions(max_new_tokens=1, seed=5).draws().random() for _ in range(2)]
    assert again[0] == again[1]
    assert SamplingOptions(max_new_tokens=1).draws().random() != again[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("stop", ("",)),
    ],
)
def test_senseless_options_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} is "):
        SamplingOptions(**{"max_new_tokens": 1} | {field: value})  # type: ignore[arg-type]
