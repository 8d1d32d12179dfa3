# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is undamaged: its files before a load, the canonical tensors in memory after it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_eve.checkpoint.canonical import TensorHash, differing
from megatron_eve.checkpoint.manifest import Manifest, check_bytes, check_folder, read_manifest
from megatron_eve.checkpoint.writer import raise_together
from megatron_eve.errors import CheckpointError


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is damaged; an earlier one may be whole."""


def verify_folder(folder: Path) -> Manifest:
    """Compare every byte of every file with the manifest; the ranks share out the files. Collective.

    Raises: DamagedCheckpointError on every rank, naming the folder or file and what is wrong with it."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    manifest, problem = None, None
    try:
        check_folder(folder)
        manifest = read_manifest(folder)
        check_bytes(folder, sorted(manifest.files)[rank::world_size], manifest)
    except CheckpointError as error:
        problem = str(error)
    try:
        raise_together(problem)
    except CheckpointError as error:
        raise DamagedCheckpointError(str(error)) from None
    assert manifest is not None
    return manifest


def refuse_differences(
    found: Mapping[str, TensorHash], expected: Mapping[str, TensorHash], *, folder: Path
) -> None:
    """Compare canonical tensors after a load with those at the save; the same on every rank.

    Raises: DamagedCheckpointError naming the tensors that differ or are on one side only."""
    wrong = differing(found, expected)
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise DamagedCheckpointError(
            f"{folder}: after loading, {shown} are not what was saved; use another checkpoint"
        )
