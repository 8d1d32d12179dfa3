# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py. Recipes say only which they are, and what they were asked for."""

from collections.abc import Callable
from enum import Enum
from typing import Any, Literal


class Format(Enum):
    """Of forward and backward tensors."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"


class Recipe:
    """Base. The original's are pydantic dataclasses, which ignore arguments that they do not know; so do these."""

    def __init__(self, **given: Any) -> None:
        for kind in type(self).__mro__:
            for name in vars(kind).get("__annotations__", {}):
                setattr(self, name, given.get(name, getattr(self, name)))


class DelayedScaling(Recipe):
    """Scales from earlier steps."""

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable[..., Any] = "max"
    scaling_factor_compute_algo: Callable[..., Any] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


class Float8CurrentScaling(Recipe):
    """Scales from the tensor itself."""

    fp8_format: Format = Format.HYBRID
    fp8_dpa: bool = False
    fp8_mha: bool = False


class Float8BlockScaling(Recipe):
    """Scales of blocks."""

    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
