# SPDX-License-Identifier: Apache-2.0
"""How a model's parameters lie in the canonical tensors: megatron-core's sharded state dicts of model chunks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.exchange_utils import (
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed import ProcessGroup

from megatron_eve.model.eve_model import EveModel


def sharding_metadata(chunks: Sequence[EveModel]) -> dict[str, Any]:
    """What megatron-core's sharded_state_dict methods need to know about the layout and the format."""
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


def spread_over_replicas(sharded: dict[str, Any], group: ProcessGroup) -> None:
    """Let each rank of `group` write an even part of what several of them hold; else the first writes all. Collective.

    `sharded`: as save_preprocess() returns it. megatron-core's fully parallel save."""
    distribution = determine_main_replica_uniform_distribution(sharded, group)
    distribute_main_replicas_with_precomputed_distribution(sharded, group, distribution)


def load_sharded(sharded: dict[str, Any], folder: str | Path, group: ProcessGroup) -> Any:
    """The tensors of a checkpoint, and the state that all ranks share. The ranks of `group`, which hold the same
    shards, read an even part each and hand it to the others: megatron-core's fully parallel load. Collective."""
    return dist_checkpointing.load(
        sharded,
        str(folder),
        sharded_strategy=FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(folder)), group
        ),
        strict=StrictHandling.ASSUME_OK_UNEXPECTED,
    )


def chunk_key(index: int, count: int) -> str:
    """The key of a model chunk in a state dict, as megatron-core's own checkpoints name it."""
    return "model" if count == 1 else f"model{index}"


def _without_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}
