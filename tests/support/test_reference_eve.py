# SPDX-License-Identifier: Apache-2.0
"""The reference model against the official code's own numbers (tests/golden/official, README.md there)."""

from pathlib import Path

import pytest
import torch

from tests.support.official import (
    CASES,
    initial_weights,
    micro_batches,
    official_batch,
    write_official_folder,
)
from tests.support.reference_eve import IGNORE, ReferenceEve, batch_loss, build_reference
from tests.support.tiny import random_samples, tiny_model


@pytest.mark.parametrize("case", CASES)
def test_equals_official_code(case: str, tmp_path: Path) -> None:
    eve = ReferenceEve(write_official_folder(case, tmp_path / case))
    eve.load_state_dict(initial_weights(case), strict=True)
    want = official_batch(case)
    outputs = [eve(sample.reference()) for sample in micro_batches()[0]]
    rows = [out.logits[:-1][out.labels[1:] != IGNORE] for out in outputs]
    torch.testing.assert_close(torch.cat(rows), want.logits, rtol=0.0, atol=1e-5)
    loss = torch.stack([out.loss_sum for out in outputs]).sum() / len(torch.cat(rows))
    assert loss.item() == pytest.approx(want.loss, rel=1e-6)
    loss.backward()
    for name, param in eve.named_parameters():
        expected = want.gradients[name]
        assert (param.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_loss_normalizations_differ_on_unequal_microbatches() -> None:
    eve = build_reference(tiny_model(), dtype=torch.float64)
    long, short = (sample.reference() for sample in random_samples(2, seed=0))
    with torch.no_grad():
        a, b = eve(long), eve(short)
        total = batch_loss(eve, [[long], [short]])
        mean = batch_loss(eve, [[long], [short]], normalization="microbatch_mean")
    assert 0 < a.num_targets != b.num_targets > 0
    targets = a.num_targets + b.num_targets
    torch.testing.assert_close(total, (a.loss_sum + b.loss_sum) / targets)
    means = a.loss_sum / a.num_targets, b.loss_sum / b.num_targets
    torch.testing.assert_close(mean, sum(means) / 2)
