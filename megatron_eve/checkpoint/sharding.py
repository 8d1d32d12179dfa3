# SPDX-License-Identifier: Apache-2.0
"""How a model's parameters lie in the canonical tensors: megatron-core's sharded state dicts of model chunks."""

from collections.abc import Sequence
from typing import Any

from megatron_eve.model.eve_model import EveModel


def sharding_metadata(chunks: Sequence[EveModel]) -> dict[str, Any]:
    """What megatron-core's sharded_state_dict methods want to know about the layout and the format."""
    return {
        "dp_cp_group": chunks[0].pg_collection.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def sharded_weights(chunks: Sequence[EveModel]) -> dict[str, Any]:
    """One sharded state dict per model chunk, under the keys `model` or `model0`, `model1`, ..."""
    metadata = sharding_metadata(chunks)
    return {
        chunk_key(index, len(chunks)): _without_extra_state(
            chunk.sharded_state_dict(metadata=metadata)
        )
        for index, chunk in enumerate(chunks)
    }


def chunk_key(index: int, count: int) -> str:
    """The key of a model chunk in a state dict, as megatron-core's own checkpoints name it."""
    return "model" if count == 1 else f"model{index}"


def _without_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
