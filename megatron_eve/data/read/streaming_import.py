# SPDX-License-Identifier: Apache-2.0
"""The one place that imports mosaicml-streaming. Gives MDSWriter, Stream, Reader, World,
reader_from_json,
mds_decode, get_shuffle.

`import streaming` runs streaming/__init__, which needs torchvision and transformers (and fails with
a CPU build of torch); the pieces that read and write MDS need neither. So `streaming` and
`streaming.base` are registered here as bare packages, with their search path and nothing executed,
and the submodules are imported below them. StreamingDataset is left out on purpose: it ends an
epoch silently or hangs on a missing shard, has a barrier over the world in its constructor, and
cannot express pipeline parallelism; plan/ takes its place. Tested with mosaicml-streaming 0.13.0,
installed without its dependencies.
"""

import importlib.util
import os
import sys
import types

from megatron_eve.errors import DataError


def _register_bare_packages() -> None:
    """Put `streaming` and `streaming.base` into sys.modules without running their __init__
    files."""
    if "streaming" in sys.modules:
        return
    spec = importlib.util.find_spec("streaming")
    if spec is None or spec.submodule_search_locations is None:
        raise DataError(
            "package `streaming` is not installed; MDS shards cannot be read. "
            "Install it with `pip install --no-deps mosaicml-streaming==0.13.0`."
        )
    roots = list(spec.submodule_search_locations)
    base = types.ModuleType("streaming.base")
    base.__path__ = [os.path.join(root, "base") for root in roots]
    package = types.ModuleType("streaming")
    package.__path__ = roots
    package.__dict__["base"] = base
    sys.modules["streaming"] = package
    sys.modules["streaming.base"] = base


_register_bare_packages()

from streaming.base.format import MDSWriter, Reader, reader_from_json  # noqa: E402
from streaming.base.format.mds.encodings import mds_decode  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402
from streaming.base.stream import Stream  # noqa: E402
from streaming.base.world import World  # noqa: E402

__all__ = [
    "MDSWriter",
    "Reader",
    "Stream",
    "World",
    "get_shuffle",
    "mds_decode",
    "reader_from_json",
]
