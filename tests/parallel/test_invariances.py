# SPDX-License-Identifier: Apache-2.0
"""What must not matter: how a global batch is cut into packs, micro-batches and ranks; what else is in a pack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_eve.data.sample import IGNORE
from tests.support.canonical import assemble
from tests.support.matrix import LAYOUTS, Check, Layout, accumulate, step_config
from tests.support.reference_eve import IMAGE_PLACEHOLDER
from tests.support.tiny import RawSample, layout, random_samples, tiny_model
from tests.support.train_once import write_reference_weights

RTOL = 1e-6  # of the largest entry of each parameter's gradient
FP32_RTOL = 5e-6  # the same in float32 throughout; one process without parallelism comes to 2.3e-6
MODEL = tiny_model()
SAMPLES = [
    dataclasses.replace(sample, place=place)
    for place, sample in enumerate(random_samples(12, seed=21))
]
SPREADS = {
    "1": layout(),
    "dp2": layout(data=2),
    "cp2": layout(context=2),
    "dp2 cp2": layout(data=2, context=2, distributed_optimizer=True),
    "dp4": layout(data=4, distributed_optimizer=True),
    "cp4": layout(context=4),
}


@pytest.fixture(scope="module")
def weights(gloo1: Any, tmp_path_factory: Any) -> str:
    folder = str(tmp_path_factory.mktemp("invariances") / "weights")
    gloo1.run(write_reference_weights, MODEL, folder)
    return folder


def shuffled(number: int) -> list[RawSample]:
    order = np.random.default_rng(number).permutation(len(SAMPLES))
    return [SAMPLES[i] for i in order]


def in_packs(samples: Sequence[RawSample], sizes: Sequence[int]) -> list[list[RawSample]]:
    assert sum(sizes) == len(samples)
    ends = np.cumsum(sizes)
    return [list(samples[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


PACKINGS = {
    "4 packs": (320, in_packs(shuffled(0), [3, 3, 3, 3])),
    "4 uneven packs": (320, in_packs(shuffled(1), [5, 1, 4, 2])),
    "8 packs, some of them empty": (256, in_packs(shuffled(2), [2, 3, 0, 1, 2, 0, 1, 3])),
    "12 packs": (128, in_packs(shuffled(3), [1] * 12)),
}

MODES: dict[str, dict[str, Any]] = {
    "global_tokens": {"loss_normalization": "global_tokens"},
    "official": {"loss_normalization": "official", "loss_group_samples": 2},
}


def checks_of(name: str, weights: str, mode: str) -> list[Check]:
    return [
        Check(
            config=step_config(
                MODEL,
                Layout(parallel=SPREADS[name]),
                stage="2.2",
                optim=MODES[mode],
                data={"pack_tokens": tokens, "align": 8, "sample_align": 8},
            ),
            weights=weights,
            packs=packs,
        )
        for tokens, packs in PACKINGS.values()
    ]


def gradients_of(
    pools: Any, checks: list[Check], *, in_float64: bool = True
) -> list[dict[str, Tensor]]:
    pool = pools[checks[0].config.parallel.world_size]
    return [
        assemble(shards)
        for shards in zip(*pool.run(accumulate, checks, in_float64=in_float64), strict=True)
    ]


def assert_equal_gradients(
    got: dict[str, Tensor], want: dict[str, Tensor], *, rtol: float, what: str
) -> None:
    for parameter, gradient in want.items():
        scale = gradient.abs().max()
        assert scale > 0
        error = float((got[parameter] - gradient).abs().max() / scale)
        assert error <= rtol, f"{what}: {parameter} off by {error:.1e}"


@pytest.mark.parametrize("mode", MODES)
def test_any_split_of_a_global_batch_gives_the_same_gradient(gloo_pools, weights, mode):  # type: ignore[no-untyped-def]
    """Over data ranks, context ranks, micro-batches and packs, whatever a sample's weight in the loss depends on.

    Computed in float64, added up and reduced in float32: what is left is the rounding of the gradient buffers."""
    want = None
    for name in SPREADS if mode == "global_tokens" else ("1", "dp2", "cp2", "dp2 cp2"):
        for number, gradients in enumerate(
            gradients_of(gloo_pools, checks_of(name, weights, mode))
        ):
            want = want or gradients
            assert_equal_gradients(gradients, want, rtol=RTOL, what=f"{name}, split {number}")


@pytest.mark.parametrize("mode", MODES)
def test_in_float32_every_split_is_the_exact_gradient_rounded(gloo_pools, weights, mode):  # type: ignore[no-untyped-def]
    """Float32 throughout, against the float64 gradient of one split. Two splits can be twice the bound apart: a row's
    place in a pack decides in which order norm weights and biases, which are sums over all rows, are added up.
    A sample's weight is one factor of its rows: one layout is enough for that."""
    exact, *_ = gradients_of(gloo_pools, checks_of("1", weights, mode)[:1])
    for name in ("1", "cp2", "cp4") if mode == "global_tokens" else ("cp2",):
        checks = checks_of(name, weights, mode)
        for number, gradients in enumerate(gradients_of(gloo_pools, checks, in_float64=False)):
            what = f"{name}, split {number}"
            assert_equal_gradients(gradients, exact, rtol=FP32_RTOL, what=what)


def masked(sample: RawSample) -> RawSample:
    return dataclasses.replace(sample, labels=torch.full_like(sample.labels, IGNORE))


def with_other_content(sample: RawSample) -> RawSample:
    """As long, with images as large, but every word and every pixel another."""
    is_text = sample.ids != IMAGE_PLACEHOLDER
    return RawSample(
        ids=torch.where(is_text, (sample.ids + 1) % MODEL.vocab_size, sample.ids),
        images=tuple(255 - image for image in sample.images),
        labels=sample.labels,
    )


def logits_of_labelled_rows(
    config: Any, weights: str, packs: Sequence[Sequence[RawSample]]
) -> list[NDArray[np.float32]]:
    """[labelled rows of this rank, its part of the vocabulary] for each pack, in a gloo worker."""
    from megatron_eve.training.step import rank_micro_batches
    from tests.support.train_once import build, packs_of_rank

    (chunk,), _, state, _ = build(config, weights=weights)
    batches = rank_micro_batches(
        packs_of_rank(packs, config=config, state=state), config=config, state=state
    )
    with torch.no_grad():
        return [chunk.logits(batch)[: batch.num_labels].numpy() for batch in batches]


@pytest.mark.parametrize("name", ["1", "cp2", "tp2 sp", "tp2 sp cp2"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_sample_does_not_see_its_neighbours(gloo_pools, weights, name, place):  # type: ignore[no-untyped-def]
    """One sample of a pack, without labels, gets another content: the logits of all others keep their bits. When a
    sample with a label does, they do not."""
    parallel = LAYOUTS[name].parallel
    config = step_config(MODEL, LAYOUTS[name], stage="2.2")
    samples = random_samples(5, seed=31)
    labelled = 1  # of random_samples: the text sample, in which every token is a label
    samples[place] = masked(samples[place])
    changed = [*samples]
    changed[place] = with_other_content(samples[place])
    control = [*samples]
    control[labelled] = with_other_content(samples[labelled])
    ranks = gloo_pools[parallel.world_size].run(
        logits_of_labelled_rows, config, weights, [samples, changed, control]
    )
    assert any(before.size for before, _, _ in ranks)
    for before, after, other in ranks:
        assert np.array_equal(before, after)
        assert not before.size or not np.array_equal(before, other)
