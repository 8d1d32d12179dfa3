# SPDX-License-Identifier: Apache-2.0
"""Whether the values of a tensor are finite: weights with NaN or infinity are refused wherever they are read."""

import math

import torch
from torch import Tensor

from megatron_eve.errors import CheckpointError


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite, without a copy of the tensor."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN wins over every number
    return math.isfinite(low.item()) and math.isfinite(high.item())


def check_finite(name: str, tensor: Tensor, *, source: object) -> Tensor:
    """The tensor itself. Raises: CheckpointError with its name and the place of the first value that is not finite."""
    if is_finite(tensor):
        return tensor
    bad = (~torch.isfinite(tensor)).nonzero()
    place = bad[0].tolist()
    raise CheckpointError(
        f"{source}: {name} holds {len(bad)} values of {tensor.numel()} that are NaN or infinite, the first one at "
        f"{place}; no training can mend them, use other weights."
    )
