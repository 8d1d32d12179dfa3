# SPDX-License-Identifier: Apache-2.0
"""The two normalisations of the loss, and micro-batches without any label."""

import types

import pytest
import torch

from megatron_eve.loop.loss import micro_batch_loss


def batch(num_labels: int) -> types.SimpleNamespace:
    weights = torch.zeros(8)
    weights[:num_labels] = 1
    return types.SimpleNamespace(label_weights=weights, num_labels=num_labels)


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
