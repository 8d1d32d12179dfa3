# SPDX-License-Identifier: Apache-2.0
"""FusedAdam's stand-in computes torch.optim.AdamW."""

import pytest
import torch

from megatron_eve.optim.adam import FusedAdam


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_equals_torch(weight_decay: float, decoupled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    optimizer = FusedAdam([ours], adam_w_mode=decoupled, **settings)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], **settings)
    for _ in range(20):
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        for param, optim in ((ours, optimizer), (theirs, reference)):
            param.grad = grad.clone()
            optim.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_step_counts_per_group_and_is_saved() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["step"] == 3
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}


def test_refuses_a_closure() -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(TypeError, match="takes no closure"):
        optimizer.step(lambda: 0.0)
