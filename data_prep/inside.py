# SPDX-License-Identifier: Apache-2.0
"""Whether a sample's path lies in the folder whose files it may name.

A relative path starts in the folder, an absolute one may lead into it. Links inside the folder may point anywhere: its
owner wanted them. `..` is followed as the file system does, through links, so that no spelling leads out.
"""

import os
from pathlib import Path


def file_inside(path: str, *, folder: Path) -> Path | None:
    """The file that `path` names, None if it lies outside `folder`. Raises ValueError if it is no path."""
    root = os.path.abspath(folder)
    target = os.path.join(root, path)  # an absolute path replaces the root
    parts = target.split("/")
    if ".." not in parts:
        if _is_below(os.path.normpath(target), root):
            return Path(target)
        return Path(target) if _is_below(_real_parent(target), os.path.realpath(root)) else None
    last = len(parts) - parts[::-1].index("..")
    base = os.path.realpath("/".join(parts[:last]))
    resolved = os.path.join(base, *parts[last:])
    for top in (root, os.path.realpath(root)):
        if _is_below(os.path.normpath(resolved), top):
            return Path(resolved)
    return None


def _real_parent(target: str) -> str:
    return os.path.join(os.path.realpath(os.path.dirname(target)), os.path.basename(target))


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")
