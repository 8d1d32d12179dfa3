# SPDX-License-Identifier: Apache-2.0
"""Process groups: every one of them, whoever made it, keeps the run's time limit."""

from typing import Any

import pytest

from megatron_eve.parallel.groups import init_model_parallel
from tests.support.tiny import layout, tiny_model
from tests.support.train_once import build_all, run_config

LIMIT_S = 17


def limits(parallel: Any) -> list[float]:
    """Seconds that each group of more than one process waits, after all that makes groups has run; in a gloo worker."""
    import torch
    from torch.distributed import distributed_c10d

    state = init_model_parallel(parallel, seed=1, timeout_s=LIMIT_S)
    config = run_config(tiny_model(), parallel)
    build_all(config, weights=None, state=state)
    world = distributed_c10d._get_default_group()
    groups = [g for g in distributed_c10d._world.pg_map if g is not world and g.size() > 1]
    cpu = torch.device("cpu")
    return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "spread", [dict(tensor=2), dict(pipeline=2), dict(context=2), dict(data=2)]
)
def test_every_group_keeps_the_limit_of_the_run(gloo2, spread):  # type: ignore[no-untyped-def]
    parallel = layout(**spread, distributed_optimizer="data" in spread)
    for found in gloo2.run(limits, parallel):
        assert found, "groups of two processes"
        assert set(found) == {LIMIT_S}
