# SPDX-License-Identifier: Apache-2.0
"""Tests that compute on a GPU: `make gpu`, or `python -m pytest -m gpu tests/gpu`. Elsewhere each is skipped, and so
are those of other folders that are named beside this one."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
