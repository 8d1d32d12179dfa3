# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar


class FP8GlobalStateManager:
    """Whether, and by which recipe, modules called now compute in FP8."""

    _recipes: ClassVar[list[Any]] = [None]

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls._recipes[-1] is not None

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls._recipes[-1]


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    FP8GlobalStateManager._recipes.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        FP8GlobalStateManager._recipes.pop()
