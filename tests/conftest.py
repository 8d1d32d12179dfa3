# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

import os
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distributions

import pytest

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share the cores
ENVIRONMENT = pytest.StashKey[dict[str, str]]()


def installed_packages() -> dict[str, str]:
    """Of this environment: version by name and, of an editable one, where it points."""
    return {
        found.name: f"{found.version} {found.read_text('direct_url.json')}"
        for found in distributions(path=[sysconfig.get_path("purelib")])
    }


def pytest_sessionstart(session: pytest.Session) -> None:
    session.stash[ENVIRONMENT] = installed_packages()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """No test changes the environment that runs it."""
    before, after = session.stash[ENVIRONMENT], installed_packages()
    changed = sorted(key for key in before | after if before.get(key) != after.get(key))
    if changed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nFAILED: a test installed or removed packages here: {', '.join(changed[:5])}")


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
