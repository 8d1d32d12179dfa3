# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def gloo_pools() -> Iterator[dict[int, object]]:
    """Worker pools by size, started on first use."""
    from tests.support.gloo import GlooPool

    pools = {size: GlooPool(size) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def gloo1(gloo_pools):  # type: ignore[no-untyped-def]
    """One process that owns its process group, so that tests do not initialise torch.distributed in pytest's."""
    return gloo_pools[1]


@pytest.fixture(scope="session")
def gloo2(gloo_pools):  # type: ignore[no-untyped-def]
    """Two processes."""
    return gloo_pools[2]


@pytest.fixture(scope="session")
def gloo4(gloo_pools):  # type: ignore[no-untyped-def]
    """Four processes."""
    return gloo_pools[4]
