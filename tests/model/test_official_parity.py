# SPDX-License-Identifier: Apache-2.0
"""Our model against numbers that the official EVEv2 code computed (tests/golden/official, README.md there).

The official weights come in through the converter's command line; the samples of a step are packed as the product packs
them, so that packs are not the official micro-batches; forward, loss, gradients and
optimizer steps are those of the product, in one process and under tensor and sequence parallelism."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_convert.tensors import eve_to_hf
from megatron_eve.config.schema import ModelConfig
from tests.support.exact_steps import ExactSteps, exact_steps
from tests.support.official import (
    CASES,
    LARGEST_MICRO_BATCH,
    PATCH_EMBEDDING_LR,
    PEAK_LR,
    convert,
    gradients_of_first_batch,
    initial_weights,
    logits_of_first_batch,
    micro_batches_of_step,
    official_batch,
    official_run,
    official_steps,
    packs,
    train,
    write_official_folder,
)
from tests.support.tiny import layout
from tests.support.train_once import EVERYTHING, read_weights

LOGITS_ATOL, LOSS_RTOL, GRAD_RTOL = 1e-5, 1e-6, 1e-5

LAYOUTS = {"one": layout(), "tp2-sp": layout(tensor=2, sequence_parallel=True)}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A golden case after our converter."""

    case: str
    model: ModelConfig
    weights: Path


@pytest.fixture(scope="module")
def imported(gloo1: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Convert a case, once."""
    done: dict[str, Imported] = {}

    def get(case: str) -> Imported:
        if case not in done:
            folder = tmp_path_factory.mktemp(case)
            model = write_official_folder(case, folder / "hf")
            gloo1.run(convert, folder / "hf", folder / "weights")
            done[case] = Imported(case, model, folder / "weights")
        return done[case]

    return get


@pytest.fixture(params=LAYOUTS)
def in_layout(request: pytest.FixtureRequest, gloo1: Any, gloo2: Any) -> Any:
    """The layout, and the pool of processes that it needs."""
    parallel = LAYOUTS[request.param]
    return parallel, gloo1 if parallel.world_size == 1 else gloo2


def by_official_names(gloo1: Any, model: ModelConfig, folder: Path) -> dict[str, Tensor]:
    (tensors,) = gloo1.run(read_weights, model, str(folder))
    return eve_to_hf(tensors, model)


@pytest.mark.parametrize("case", CASES)
def test_logits(imported: Any, in_layout: Any, case: str) -> None:
    source, (parallel, pool) = imported(case), in_layout
    config = official_run(source.model, parallel)
    for logits in pool.run(logits_of_first_batch, config, source.weights):
        torch.testing.assert_close(logits, official_batch(case).logits, atol=LOGITS_ATOL, rtol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient(
    imported: Any, in_layout: Any, gloo1: Any, case: str, tmp_path: Path
) -> None:
    source, (parallel, pool) = imported(case), in_layout
    config = official_run(source.model, parallel)
    losses = pool.run(gradients_of_first_batch, config, source.weights, tmp_path / "out")
    want = official_batch(case)
    assert losses == [pytest.approx(want.loss, rel=LOSS_RTOL)] * len(losses)
    gradients = by_official_names(gloo1, source.model, tmp_path / "out")
    assert gradients.keys() == want.gradients.keys()
    for name, expected in want.gradients.items():
        scale = expected.abs().max()
        assert scale > 0, f"{name} has no gradient in the official run: nothing would be proved"
        error = float((gradients[name] - expected).abs().max() / scale)
        assert error <= GRAD_RTOL, f"{name}: relative error {error:.1e}"


STEPS_OF = (*CASES, "v2.0-stage2.1")


def test_packs_are_not_the_official_micro_batches(tmp_path: Path) -> None:
    """Else the steps below would not show that the loss is a property of samples."""
    model = write_official_folder("v2.0", tmp_path / "hf")
    mixed = 0
    for step in range(5):
        groups = [
            {place // LARGEST_MICRO_BATCH for place in pack.sample_places}
            for pack in packs(micro_batches_of_step(step), model)
        ]
        mixed += any(len(of_pack) > 1 for of_pack in groups)
    assert mixed == 5


def run_steps(imported: Any, in_layout: Any, name: str, out: Path, **optim: Any) -> Any:
    """The case, its metrics per step in our code, and the exact run with its bound."""
    source, (parallel, pool) = imported(name.removesuffix("-stage2.1")), in_layout
    stage2_1 = name.endswith("-stage2.1")
    trainable = ("patch_embedding", "vision") if stage2_1 else EVERYTHING
    config = official_run(source.model, parallel, trainable=trainable)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim))
    metrics = pool.run(train, config, source.weights, out)[0]
    exact = exact_steps(source.case, source.model, stage2_1=stage2_1, grad_rtol=GRAD_RTOL)
    return source, metrics, exact


def outside(found: dict[str, Tensor], want: dict[str, Tensor], exact: ExactSteps) -> list[str]:
    """The parameters of which any element lies outside the bound."""
    return [n for n, w in want.items() if ((found[n] - w).abs() > exact.bound[n]).any()]


@pytest.mark.parametrize("name", STEPS_OF)
def test_twenty_optimizer_steps(
    imported: Any, in_layout: Any, gloo1: Any, name: str, tmp_path: Path
) -> None:
    """AdamW, warm-up and cosine, two micro-batches a step, mean of their means, no clipping; steps of text alone."""
    source, metrics, exact = run_steps(imported, in_layout, name, tmp_path / "out")
    want = official_steps(name)
    losses = want.micro_batch_losses.double().mean(1)
    torch.testing.assert_close(losses, exact.losses, rtol=LOSS_RTOL, atol=0.0)
    assert [m["loss"] for m in metrics] == pytest.approx(losses.tolist(), rel=LOSS_RTOL)
    assert [m["grad_norm"] for m in metrics] == pytest.approx(
        want.grad_norms.tolist(), rel=GRAD_RTOL
    )
    rates = [[m.get("lr"), m.get("patch_embedding_lr")] for m in metrics]
    torch.testing.assert_close(
        torch.tensor(rates, dtype=torch.float64), want.learning_rates, rtol=1e-12, atol=1e-18
    )
    found = by_official_names(gloo1, source.model, tmp_path / "out")
    assert not outside(want.final, exact.final, exact), "the official run itself"
    assert not outside(found, want.final, exact)
    start = initial_weights(source.case)
    frozen = start.keys() - want.final.keys()
    assert all(torch.equal(found[name], start[name]) for name in frozen)


CHANGES: dict[str, dict[str, Any]] = {
    "global-tokens": {"loss_normalization": "global_tokens", "loss_group_samples": None},
    "sample-mean": {"loss_normalization": "sample_mean", "loss_group_samples": None},
    "groups-of-two": {"loss_group_samples": 2},
    "clipping": {"clip_grad": 1.0},
    "beta2": {"adam_beta2": 0.95},
    "rate-plus-1%": {
        "peak_lr": 1.01 * PEAK_LR,
        "patch_embedding_lr": 1.01 * PATCH_EMBEDDING_LR,
    },
}


@pytest.mark.parametrize("in_layout", ["one"], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_the_bound_notices_another_optimizer(
    imported: Any, in_layout: Any, gloo1: Any, change: str, tmp_path: Path
) -> None:
    """The mutation: a step that is not the official one leaves the bound in every parameter."""
    out = tmp_path / "out"
    source, _, exact = run_steps(imported, in_layout, "v2.0", out, **CHANGES[change])
    found = by_official_names(gloo1, source.model, out)
    want = official_steps("v2.0").final
    assert set(outside(found, want, exact)) == set(want)
