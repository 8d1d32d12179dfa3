# SPDX-License-Identifier: Apache-2.0
"""Moving rows between orders, and the last layer's restriction to the rows that feed a label."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_eve.model.modality import gathered_rows, permute_rows, select_rows
from tests.support.tiny import (
    ALL,
    DENSE,
    SplitConfig,
    layout,
    naive_pack,
    random_samples,
    tiny_model,
)
from tests.support.train_once import run_config


def double(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_permute_rows_and_its_backward() -> None:
    x, index = double(5, 3), torch.tensor([3, 0, 4, 1, 2])
    inverse = index.argsort()
    assert torch.equal(permute_rows(x, index=index, inverse=inverse), x[index])
    assert torch.autograd.gradcheck(lambda y: permute_rows(y, index=index, inverse=inverse), x)


def test_select_rows_and_its_backward() -> None:
    """Rows 1 and 3 are not selected: no gradient."""
    x, index = double(5, 2, 3), torch.tensor([4, 0, 2])
    assert torch.equal(select_rows(x, index), x[index])
    assert torch.autograd.gradcheck(lambda y: select_rows(y, index), x)


def test_a_row_from_nowhere_is_finite_and_sends_no_gradient_back() -> None:
    """Index 4 of 4 rows, twice; whatever gradient arrives there, even NaN, stays out of the real rows."""
    x, index = double(4, 3), torch.tensor([4, 1, 4, 3])
    out = select_rows(x, index)
    assert torch.equal(out[[1, 3]], x[[1, 3]])
    assert out.isfinite().all()
    gradient = torch.ones(4, 3, dtype=torch.float64)
    gradient[0], gradient[2] = float("nan"), float("inf")
    out.backward(gradient)
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [1.0] * 3]


def test_gathered_rows_is_what_an_all_gather_makes() -> None:
    """Two ranks of a pack with 4 vision and 6 text tokens: [v0 v1 t0 t1 t2 | v2 v3 t3 t4 t5]."""
    rows = gathered_rows(num_tokens=10, num_vision=4, tensor_parallel=2)
    ranks = [["v0", "v1", "t0", "t1", "t2"], ["v2", "v3", "t3", "t4", "t5"]]
    gathered = [token for rank in ranks for token in rank]
    assert [gathered[row] for row in rows] == [f"v{i}" for i in range(4)] + [
        f"t{i}" for i in range(6)
    ]
    whole = gathered_rows(num_tokens=10, num_vision=4, tensor_parallel=1)
    assert torch.equal(whole, torch.arange(10))


def _kept_against_all(split: SplitConfig, seed: int) -> tuple[dict[str, float], int, int]:
    """Largest differences when the last layer computes all rows instead; rows it keeps; rows there are."""
    from megatron_eve.model.build import build_model
    from megatron_eve.model.micro_batch import RankPlace, micro_batch
    from megatron_eve.parallel.groups import init_model_parallel
    from tests.support.train_once import ALIGN, TOKENS

    config = tiny_model(split)
    state = init_model_parallel(layout(), seed=1)
    (model,), _ = build_model(run_config(config, layout()), state=state)
    model.double()
    pack = naive_pack(random_samples(5, seed=seed), model=config, tokens=TOKENS, align=ALIGN)
    batch = micro_batch(
        pack,
        place=RankPlace(),
        split_attention=split.attention,
        align=ALIGN,
        device=torch.device("cpu"),
    )
    kept = batch.routing.kept
    assert kept is not None
    whole = copy.copy(batch.routing)
    whole.kept = None
    padding = batch.label_rows.numel() - pack.label_rows.numel()
    everything = dataclasses.replace(
        batch, routing=whole, label_rows=F.pad(pack.label_rows, (0, padding))
    )
    some, gradients = _loss_and_gradients(model, batch)
    every, wanted = _loss_and_gradients(model, everything)
    gaps = {name: float((gradients[name] - wanted[name]).abs().max()) for name in wanted}
    return gaps | {"loss": abs(some - every)}, kept.residual.numel(), pack.num_tokens


def _loss_and_gradients(model: Any, batch: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    rows = F.cross_entropy(model.logits(batch), batch.label_targets, reduction="none")
    loss = (rows * batch.label_weights).sum()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "split",
    [ALL, DENSE, SplitConfig(norm=False, attention=False, ffn=True)],
    ids=["all", "dense", "ffn"],
)
def test_rows_without_label_feed_nothing_behind_the_last_attention(gloo1, split):  # type: ignore[no-untyped-def]
    """Loss and every gradient are those of a last layer that computes every row; fewer rows are computed."""
    ((gaps, num_kept, num_rows),) = gloo1.run(_kept_against_all, split, 3)
    assert num_kept < num_rows / 2
    assert max(gaps.values()) <= 1e-12, gaps
