# SPDX-License-Identifier: Apache-2.0
"""The two normalisations of the loss, and micro-batches without any label."""

import types

import pytest
import torch

from megatron_eve.loop.loss import micro_batch_loss


def batch(num_labels: int) -> types.SimpleNamespace:
    weights = torch.zeros(8)
    weights[:num_labels] = 1
    return types.SimpleNamespace(
        label_weights=weights,
        num_labels=num_labels,
        num_pack_labels=num_labels,
        is_first_context_rank=True,
    )


def total(normalization: str, counts: list[int]) -> tuple[float, list[torch.Tensor]]:
    rows = [torch.arange(1.0, 9.0).requires_grad_() for _ in counts]
    losses = [
        micro_batch_loss(r, batch=batch(n), normalization=normalization)  # type: ignore[arg-type]
        for r, n in zip(rows, counts, strict=True)
    ]
    loss = sum(x.numerator for x in losses) / sum(x.denominator for x in losses)
    loss.backward()
    return float(loss), [r.grad for r in rows]  # type: ignore[misc]


def test_global_tokens_is_the_mean_over_all_labels() -> None:
    loss, grads = total("global_tokens", [2, 4])
    assert loss == pytest.approx((1 + 2 + 1 + 2 + 3 + 4) / 6)
    assert grads[0].tolist() == pytest.approx([1 / 6] * 2 + [0] * 6)


def test_microbatch_mean_weighs_each_micro_batch_equally() -> None:
    loss, grads = total("microbatch_mean", [2, 4])
    assert loss == pytest.approx((1.5 + 2.5) / 2)
    assert grads[0].tolist() == pytest.approx([1 / 4] * 2 + [0] * 6)


@pytest.mark.parametrize("normalization", ["global_tokens", "microbatch_mean"])
def test_a_micro_batch_without_labels_counts_for_nothing(normalization: str) -> None:
    """The official code gives NaN here (EVE issue tracker: NaN loss in SFT)."""
    loss, grads = total(normalization, [4, 0])
    assert loss == pytest.approx(2.5)
    assert grads[1].tolist() == [0.0] * 8


@pytest.mark.parametrize("normalization", ["global_tokens", "microbatch_mean"])
@pytest.mark.parametrize("counts", [(3, 1), (4, 0), (0, 0)])
def test_context_ranks_together_are_one_micro_batch(
    normalization: str, counts: tuple[int, int]
) -> None:
    """Numerators and denominators of both parts add up to those of the whole pack, also if one part has no label."""
    every = torch.arange(1.0, 9.0)
    parts = [every[: counts[0]], every[counts[0] : sum(counts)]]
    whole = micro_batch_loss(every, batch=batch(sum(counts)), normalization=normalization)  # type: ignore[arg-type]
    shared = []
    for rank, rows in enumerate(parts):
        of_rank = batch(len(rows))
        of_rank.num_pack_labels, of_rank.is_first_context_rank = sum(counts), rank == 0
        padded = torch.nn.functional.pad(rows, (0, 8 - len(rows)))
        shared.append(micro_batch_loss(padded, batch=of_rank, normalization=normalization))  # type: ignore[arg-type]
    assert float(sum(x.numerator for x in shared)) == pytest.approx(float(whole.numerator))
    assert int(sum(x.denominator for x in shared)) == int(whole.denominator)
    assert sum(x.logged for x in shared).tolist() == pytest.approx(whole.logged.tolist())  # type: ignore[union-attr]
