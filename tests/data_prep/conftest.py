# SPDX-License-Identifier: Apache-2.0
"""Builds inside the test process do not wait for the disk; those in subprocesses do."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_eve.whole.sync_path", lambda path: None)
        yield
