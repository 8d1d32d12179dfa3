# SPDX-License-Identifier: Apache-2.0
"""A weights folder as a converter leaves it, written by the ranks of a training layout."""

from collections.abc import Sequence
from pathlib import Path

from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.sharding import sharded_weights
from megatron_eve.checkpoint.writer import Contents, FolderWrite
from megatron_eve.model.eve_model import EveModel


def save_weights(chunks: Sequence[EveModel], folder: str | Path, *, config_text: str) -> None:
    """Write the weights of all ranks to `folder`, which must not exist or be empty. Collective."""
    contents = Contents(
        state=sharded_weights(chunks),
        config_text=config_text,
        facts={"kind": "weights"},
        tensors=canonical_hashes(chunks),
    )
    write = FolderWrite(Path(folder), contents, replicas=chunks[0].pg_collection.dp_cp)
    write.start()
    write.finish()
