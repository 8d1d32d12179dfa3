# SPDX-License-Identifier: Apache-2.0
"""Folders of installed packages whose files a demonstration uses, found without importing the packages."""

import importlib.util
from pathlib import Path

from megatron_eve.errors import ConfigError


def package_folder(module: str, *, install: str) -> Path:
    """The folder of an installed package. Raises ConfigError that names the pip command if it is missing."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the package `{module}` is not installed; run: pip install {install}")
    return Path(spec.submodule_search_locations[0])
