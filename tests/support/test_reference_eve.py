# SPDX-License-Identifier: Apache-2.0
"""The reference model against the official code's own numbers (tests/golden/official, README.md there)."""

from pathlib import Path

import pytest
import torch

from megatron_eve.config.schema import LossNormalization
from tests.support.official import (
    CASES,
    initial_weights,
    micro_batches,
    official_batch,
    write_official_folder,
)
from tests.support.reference_eve import IGNORE, ReferenceEve, batch_loss, build_reference
from tests.support.tiny import random_samples, tiny_model

MODES: tuple[LossNormalization, ...] = ("global_tokens", "sample_mean", "sqrt_tokens", "official")


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
    """Two samples in one micro-batch, one in another, one without a target in a third."""
    eve = build_reference(tiny_model(), dtype=torch.float64)
    samples = [sample.reference() for sample in random_samples(5, seed=0)]
    batches = [samples[:2], samples[2:3], samples[4:]]
    with torch.no_grad():
        sums, counts = zip(*((o.loss_sum, o.num_targets) for o in map(eve, samples)), strict=True)
        loss = {how: batch_loss(eve, batches, normalization=how) for how in MODES}
    (a, b, c), (x, y, z) = sums[:3], counts[:3]
    assert len({x, y, z}) == 3 and min(x, y, z) > 0 and counts[4] == 0
    torch.testing.assert_close(loss["global_tokens"], (a + b + c) / (x + y + z))
    torch.testing.assert_close(loss["sample_mean"], (a / x + b / y + c / z) / 3)
    torch.testing.assert_close(loss["official"], ((a + b) / (x + y) + c / z) / 2)
    roots = [n**0.5 for n in (x, y, z)]
    weighted = sum(total / root for total, root in zip((a, b, c), roots, strict=True))
    torch.testing.assert_close(loss["sqrt_tokens"], weighted / sum(roots))
