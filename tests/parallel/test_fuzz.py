# SPDX-License-Identifier: Apache-2.0
"""Random packs on several ranks: no rank waits for ever (the pool's timeout), gradients are the single process's.

Data-parallel ranks get different packs, one of text alone beside one of an image alone; the others share theirs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from megatron_eve.data.sample import Pack
from tests.support.canonical import assemble
from tests.support.fuzz import ALIGN, SAMPLE_ALIGN, TOKENS, fuzz_step, gradients_of_fuzz_steps
from tests.support.reference_eve import IMAGE_PLACEHOLDER
from tests.support.tiny import RawSample, layout, naive_pack, tiny_model
from tests.support.train_once import run_config, write_reference_weights

GRAD_RTOL = 1e-5
MODEL = tiny_model(layers=2)
LAYOUTS = {
    "tp2 sp": layout(tensor=2, sequence_parallel=True),
    "cp2": layout(context=2),
    "dp2": layout(data=2, distributed_optimizer=True, overlap=True),
    "pp2": layout(pipeline=2),
    "tp2 sp cp2": layout(tensor=2, context=2, sequence_parallel=True),
}
PER_TASK = 2  # steps of one task, so that it ends well before the pool's timeout
FAST, ALL = (
    ((0, 1, 2, 9), 25),
    (tuple(range(20)), 50),
)  # numbers of the steps, packs of each; 9 and 19 have no label


@pytest.fixture(scope="module")
def weights(gloo1: Any, tmp_path_factory: Any) -> str:
    folder = str(tmp_path_factory.mktemp("fuzz") / "weights")
    gloo1.run(write_reference_weights, MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def single(gloo1: Any, weights: str) -> Any:
    """Gradients of a single process by (step, number of packs), computed when first asked for."""
    made: dict[tuple[int, int], dict[str, Tensor]] = {}

    def get(number: int, num_packs: int) -> dict[str, Tensor]:
        if (number, num_packs) not in made:
            (steps,) = gloo1.run(
                gradients_of_fuzz_steps, config_of(layout()), weights, [number], num_packs
            )
            made[number, num_packs] = assemble(steps)
        return made[number, num_packs]

    return get


def config_of(parallel: Any) -> Any:
    data = dict(pack_tokens=TOKENS, align=ALIGN, sample_align=SAMPLE_ALIGN)
    return run_config(MODEL, parallel, data=data)


def check(
    pools: Any, weights: str, single: Any, name: str, numbers: Sequence[int], num_packs: int
) -> None:
    parallel = LAYOUTS[name]
    for first in range(0, len(numbers), PER_TASK):
        some = numbers[first : first + PER_TASK]
        ranks = pools[parallel.world_size].run(
            gradients_of_fuzz_steps, config_of(parallel), weights, some, num_packs
        )
        for number, *shards in zip(some, *ranks, strict=True):
            assert_same(assemble(shards), single(number, num_packs), number=number)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], *, number: int) -> None:
    assert got.keys() == want.keys()
    without_label = number % 10 == 9
    for name, gradient in want.items():
        scale = gradient.abs().max()
        assert (scale == 0) == without_label, f"step {number}, {name}: largest gradient {scale}"
        rows = len(gradient)
        error = (got[name][:rows] - gradient).abs().max()
        assert error <= GRAD_RTOL * scale, f"step {number}, {name}: off by {error / scale:.1e}"


@pytest.mark.parametrize("name", ["tp2 sp", "cp2", "dp2"])
def test_a_hundred_packs(gloo_pools, weights, single, name):  # type: ignore[no-untyped-def]
    check(gloo_pools, weights, single, name, *FAST)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_thousand_packs(gloo_pools, weights, single, name):  # type: ignore[no-untyped-def]
    check(gloo_pools, weights, single, name, *ALL)


EDGES: dict[str, Callable[[Pack, list[RawSample]], bool]] = {
    "no sample": lambda pack, samples: not samples,
    "no image": lambda pack, samples: bool(samples) and pack.num_real_vision == 0,
    "no text": lambda pack, samples: (
        bool(samples) and all(len(sample.ids) == len(sample.images) for sample in samples)
    ),
    "a single token": lambda pack, samples: [len(sample.ids) for sample in samples] == [1],
    "no label": lambda pack, samples: pack.label_rows.numel() == 0,
    "as much vision as fits": lambda pack, samples: pack.num_real_vision == TOKENS - ALIGN,
    "one full block of vision": lambda pack, samples: pack.num_real_vision == ALIGN,
    "one block of text": lambda pack, samples: pack.num_vision == TOKENS - ALIGN,
    "image first": lambda pack, samples: any(s.ids[0] == IMAGE_PLACEHOLDER for s in samples),
    "image last": lambda pack, samples: any(s.ids[-1] == IMAGE_PLACEHOLDER for s in samples),
}


@pytest.mark.parametrize("edge", EDGES)
def test_the_packs_reach_every_edge(edge: str) -> None:
    """Else the tests above would prove less than they say."""
    sizes = dict(model=MODEL, tokens=TOKENS, align=ALIGN, sample_align=SAMPLE_ALIGN)
    steps = [fuzz_step(number, num_packs=FAST[1]) for number in FAST[0]]
    assert any(
        EDGES[edge](naive_pack(samples, **sizes), samples) for step in steps for samples in step
    )
