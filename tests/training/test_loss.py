# SPDX-License-Identifier: Apache-2.0
"""The weight of each sample in the loss: the arithmetic, against loops over samples and groups. Whole steps on packs of
the real data path: tests/parallel/test_loss_weights.py."""

import dataclasses
import itertools
import math
import types
from typing import Any

import pytest
import torch

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.resolve import resolve
from megatron_eve.config.schema import OptimConfig
from megatron_eve.config.text_form import config_from_text, config_text
from megatron_eve.errors import ConfigError
from megatron_eve.parallel.groups import init_model_parallel
from megatron_eve.training.loss import label_weights, micro_batch_loss, token_weights
from tests.support.tiny import layout, naive_pack, random_samples, tiny_model

MODES: tuple[tuple[str, int | None], ...] = (
    ("global_tokens", None),
    ("sample_mean", None),
    ("sqrt_tokens", None),
    ("official", 1),
    ("official", 2),
    ("official", 3),
    ("official", 8),
)
COUNTS = {
    "short and long": [4, 180, 3, 150, 2, 200],
    "a sample without labels": [4, 0, 3, 150],
    "a group without labels": [0, 0, 7, 5, 1, 0],
    "the last group is smaller": [9, 2, 30, 4, 5],
    "one label": [0, 1],
}


def optim_of(mode: str, group: int | None) -> OptimConfig:
    base = load_recipe("eve_tiny_stage3").optim
    return dataclasses.replace(base, loss_normalization=mode, loss_group_samples=group)  # type: ignore[arg-type]


def naive_loss(samples: list[list[float]], *, mode: str, group: int | None) -> float:
    """What the setting asks for, from the token losses of each sample."""
    if mode == "official":
        assert group is not None
        groups = [
            list(itertools.chain(*samples[i : i + group])) for i in range(0, len(samples), group)
        ]
        means = [sum(tokens) / len(tokens) for tokens in groups if tokens]
        return sum(means) / len(means)
    samples = [tokens for tokens in samples if tokens]
    power = {"global_tokens": 0.0, "sqrt_tokens": 0.5, "sample_mean": 1.0}[mode]
    weights = [len(tokens) ** -power for tokens in samples]
    total = sum(w * sum(tokens) for w, tokens in zip(weights, samples, strict=True))
    return total / sum(w * len(tokens) for w, tokens in zip(weights, samples, strict=True))


@pytest.mark.parametrize(("mode", "group"), MODES)
@pytest.mark.parametrize("name", COUNTS)
def test_weights_give_the_loss_that_was_asked_for(mode: str, group: int | None, name: str) -> None:
    counts = COUNTS[name]
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(n, generator=generator, dtype=torch.float64).tolist() for n in counts]
    weights = token_weights(torch.tensor(counts), optim=optim_of(mode, group))
    total = sum(w * sum(tokens) for w, tokens in zip(weights.tolist(), losses, strict=True))
    want = naive_loss(losses, mode=mode, group=group)
    assert total / sum(counts) == pytest.approx(want, rel=1e-12)
    mean = sum(w * n for w, n in zip(weights.tolist(), counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(1.0), "gradients of a micro-batch are as large in every mode"


@pytest.mark.parametrize(("mode", "group"), MODES)
def test_a_step_without_any_label_has_no_weight_and_no_nan(mode: str, group: int | None) -> None:
    weights = token_weights(torch.zeros(4, dtype=torch.int64), optim=optim_of(mode, group))
    assert not weights.isnan().any()


def test_short_answers_weigh_as_in_the_official_code() -> None:
    """4 label tokens beside 180 in turn: half of the samples have 2% of the tokens."""
    counts = torch.tensor([4, 180] * 8 + [4, 4] * 2 + [180, 180] * 2)
    shares = {}
    for mode, group in (("global_tokens", None), ("official", 2), ("sample_mean", None)):
        parts = token_weights(counts, optim=optim_of(mode, group)) * counts
        shares[mode] = float(parts[counts == 4].sum() / parts.sum())
    assert shares["global_tokens"] == pytest.approx(4 / 184)
    assert shares["official"] == pytest.approx((8 * 4 / 184 + 2) / 12)
    assert shares["sample_mean"] == pytest.approx(0.5)


def batch(num_labels: int, weights: torch.Tensor) -> Any:
    padded = torch.nn.functional.pad(weights, (0, 8 - num_labels))
    return types.SimpleNamespace(label_weights=padded, num_labels=num_labels)


@pytest.mark.parametrize("counts", [(2, 4), (4, 0), (0, 0)])
def test_a_step_is_the_weighted_sum_over_the_number_of_labels(counts: tuple[int, int]) -> None:
    """A micro-batch without labels counts for nothing (the official code gives NaN)."""
    rows = [torch.arange(1.0, 9.0).requires_grad_() for _ in counts]
    weights = [torch.linspace(0.5, 2.0, n) for n in counts]
    parts = [
        micro_batch_loss(r, batch=batch(n, w))
        for r, n, w in zip(rows, counts, weights, strict=True)
    ]
    total = sum(x.numerator for x in parts)
    assert isinstance(total, torch.Tensor)
    total.backward()
    denominator = sum(int(x.denominator) for x in parts)
    want = sum(
        float((torch.arange(1.0, n + 1) * w).sum()) for n, w in zip(counts, weights, strict=True)
    )
    assert (float(total.detach()), denominator) == (pytest.approx(want), sum(counts))
    assert torch.stack([x.logged for x in parts]).sum(0).tolist() == pytest.approx(
        [want, sum(counts)]
    )
    for r, n, w in zip(rows, counts, weights, strict=True):
        assert r.grad is not None
        assert r.grad.tolist() == pytest.approx([*w.tolist(), *[0.0] * (8 - n)])


def weights_of_two_packs(places: list[list[int]]) -> list[list[float]]:
    """In a worker."""
    state = init_model_parallel(layout(), seed=1)
    samples = random_samples(4, seed=2)
    packs = [
        naive_pack(
            [dataclasses.replace(samples[i], place=p) for i, p in zip((2 * n, 2 * n + 1), of_pack, strict=True)],
            model=tiny_model(), tokens=160, align=8, step_places=6,
        )
        for n, of_pack in enumerate(places)
    ]  # fmt: skip
    optim = optim_of("official", 2)
    found = label_weights(packs, optim=optim, group=state.groups.dp, device=state.device)
    return [weights.tolist() for weights in found]


def test_groups_reach_over_packs(gloo1: Any) -> None:
    """Samples 0 and 2, 1 and 3 are groups and lie in different packs."""
    ((first, second),) = gloo1.run(weights_of_two_packs, [[0, 3], [1, 2]])
    labels = [int((s.labels[1:] != -100).sum()) for s in random_samples(4, seed=2)]
    pairs = [labels[0] + labels[2], labels[1] + labels[3]]
    scale = sum(labels) / 2
    want = [scale / pairs[i % 2] for i in range(4)]
    assert sorted(set(first)) == pytest.approx(sorted({want[0], want[1]}))
    assert sorted(set(second)) == pytest.approx(sorted({want[2], want[3]}))
    assert math.isclose(sum(first) + sum(second), sum(labels), rel_tol=1e-6)


def test_two_samples_in_one_place_are_noticed(gloo1: Any) -> None:
    with pytest.raises(AssertionError, match="two samples of a step have the same place"):
        gloo1.run(weights_of_two_packs, [[0, 1], [1, 2]])


REFUSED = {
    r"microbatch_mean is not offered any more: .* Use official": ["optim.loss_normalization=microbatch_mean"],
    r"official needs optim\.loss_group_samples, found none": ["optim.loss_normalization=official"],
    r"optim\.loss_group_samples=2 belongs to .*=official, found sample_mean": [
        "optim.loss_normalization=sample_mean", "optim.loss_group_samples=2",
    ],
    r"batch\.size=9 samples is not a multiple of optim\.loss_group_samples=2; .* so use 10": [
        "optim.loss_normalization=official", "optim.loss_group_samples=2", "batch.unit=samples", "batch.size=9",
    ],
    r"optim\.loss_group_samples=0 is below 1": [
        "optim.loss_normalization=official", "optim.loss_group_samples=0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusal_says_what_to_use(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(apply_overrides(load_recipe("eve_tiny_stage3"), REFUSED[message]))


@pytest.mark.parametrize("mode", ["microbatch_mean", "global_tokens"])
def test_configurations_of_earlier_runs_are_read(mode: str) -> None:
    """They name no group, and may name the mean over packs."""
    lines = config_text(load_recipe("eve_tiny_stage3")).splitlines()
    older = [line for line in lines if not line.startswith("optim.loss_")]
    config = config_from_text("\n".join([*older, f"optim.loss_normalization: {mode}"]))
    assert config.optim.loss_normalization == mode
    assert config.optim.loss_group_samples is None


@pytest.mark.parametrize(
    ("stage", "size"), [("1", 8), ("2_1_ld", 4), ("2_1_hd", 2), ("2_2", 2), ("3", 2)]
)
def test_the_7b_recipes_weigh_as_their_scripts(stage: str, size: int) -> None:
    """--per_device_train_batch_size of the five scripts."""
    optim = resolve(load_recipe(f"eve7b_stage{stage}")).optim
    assert (optim.loss_normalization, optim.loss_group_samples) == ("official", size)
