# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


@contextlib.contextmanager
def activation_recompute_forward(
    activation_recompute: bool = False, recompute_phase: bool = False
) -> Iterator[None]:
    yield


class CudaRNGStatesTracker:
    """Only there to be derived from."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Re-entrant, and under the recipe of the forward."""
    recipe = FP8GlobalStateManager.get_fp8_recipe()

    def under_the_same_recipe(*inputs: Tensor) -> Any:
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(under_the_same_recipe, *args, use_reentrant=True)
