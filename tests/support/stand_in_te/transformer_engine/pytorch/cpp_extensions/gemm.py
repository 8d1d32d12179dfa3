# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

import functools

import torch
from torch import Tensor


@functools.cache
def get_cublas_workspace(device: int, ub: bool, grouped_gemm: bool) -> Tensor:
    """One a device, as in the release: products on two streams would share it."""
    return torch.empty(8)
