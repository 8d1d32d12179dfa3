# SPDX-License-Identifier: Apache-2.0
"""One process of each data-parallel rank reads; every process that computes on the packs gets the same."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_eve.config.schema import ParallelConfig
from megatron_eve.data.sample import Pack
from megatron_eve.parallel.groups import init_model_parallel
from tests.support.tiny import layout, naive_pack, random_samples, tiny_model


def packs_of(dp_rank: int) -> list[Pack]:
    """Two packs that differ in everything, the second without an image."""
    model = tiny_model()
    samples = [random_samples(3, seed=dp_rank), random_samples(7, seed=dp_rank)[1::5]]
    return [naive_pack(s, model=model, tokens=128, align=8, sample_align=4) for s in samples]


def received(parallel: ParallelConfig) -> dict[str, Any]:
    """What next_step gives this process, and where the process is."""
    from megatron_eve.training.feed import next_step

    state = init_model_parallel(parallel, seed=1)
    source = iter([packs_of(state.dp_rank)]) if state.is_data_leader else None
    packs = next_step(source, state=state)
    return {
        "dp_rank": state.dp_rank,
        "is_first_stage": state.is_first_stage,
        "is_leader": state.is_data_leader,
        "packs": [_plain(pack) for pack in packs],
    }


def _plain(pack: Pack) -> dict[str, Any]:
    fields = {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }


LAYOUTS = {
    "cp2": layout(context=2),
    "tp2": layout(tensor=2),
    "dp2": layout(data=2),
    "cp4": layout(context=4),
    "tp2 cp2": layout(tensor=2, context=2),
    "pp2 cp2": layout(pipeline=2, context=2),
    "cp2 dp2": layout(context=2, data=2),
    "tp2 pp2": layout(tensor=2, pipeline=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_process_gets_the_packs_of_its_data_rank(gloo_pools, name):  # type: ignore[no-untyped-def]
    """All fields; pixels on the first pipeline stage, nowhere else."""
    parallel = LAYOUTS[name]
    ranks = gloo_pools[parallel.world_size].run(received, parallel)
    assert sum(rank["is_leader"] for rank in ranks) == parallel.data
    for rank in ranks:
        want = [_plain(pack) for pack in packs_of(rank["dp_rank"])]
        for pack in want:
            pack["patches"] = pack["patches"] if rank["is_first_stage"] else None
        assert rank["packs"] == want
