# SPDX-License-Identifier: Apache-2.0
"""The live objects of a run as megatron-core's sharded state, and back into them."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eve.checkpoint.sharding import (
    chunk_key,
    load_sharded,
    sharded_weights,
    sharding_metadata,
)
from megatron_eve.checkpoint.weights import LOAD_ERRORS, load_chunks, reason_of
from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel

_AXES = ("processes", "tensor", "pipeline", "virtual_pipeline", "context")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The live objects that a checkpoint saves and restores."""

    chunks: Sequence[EveModel]
    wrapped: Sequence[DistributedDataParallel]  # the same
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


def saved_state(training: TrainingState) -> dict[str, Any]:
    """What a checkpoint holds of these objects: sharded tensors and objects, and the state that all ranks share."""
    _gather_parameters(training.wrapped)
    _agree_on_step(training.optimizer)
    state = _sharded(training, is_loading=False)
    _leave_out_empty_state(state["optimizer"])
    return {**state, "schedule": training.schedule.state_dict()}


def layout_of(training: TrainingState) -> dict[str, int | None]:
    """The layout, as far as random generators depend on it."""
    return dict(zip(_AXES, json.loads(_world(training)), strict=True))


def restore(training: TrainingState, path: Path) -> tuple[dict[str, Any], bool]:
    """Load all but the random generators. Returns what the folder holds, and whether this is the layout that wrote it.

    Raises: CheckpointError if it does not fit this model and optimizer."""
    wanted = _sharded(training, is_loading=True)
    same_layout = dist_checkpointing.load_common_state_dict(str(path))["world"] == _world(training)
    if not same_layout:
        del wanted["random"]
    try:
        loaded = load_sharded(wanted, path, training.chunks[0].pg_collection.dp_cp)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"cannot resume from {path}: {reason_of(error)}. At a change of stage or model start a new run "
            "directory with checkpoint.load_weights_from instead"
        ) from None
    load_chunks(training.chunks, loaded)
    limits = [(group["max_lr"], group["min_lr"]) for group in training.optimizer.param_groups]
    if not training.optimizer.config.use_distributed_optimizer:
        _restore_empty_state(loaded["optimizer"])
    training.optimizer.load_state_dict(loaded["optimizer"])
    # The configuration's learning rate counts, not the checkpoint's: a run may be lengthened.
    for group, (max_lr, min_lr) in zip(training.optimizer.param_groups, limits, strict=True):
        group["max_lr"], group["min_lr"] = max_lr, min_lr
    training.schedule.load_state_dict(loaded["schedule"])
    return loaded, same_layout


def _sharded(training: TrainingState, *, is_loading: bool) -> dict[str, Any]:
    chunks = training.chunks
    weights = sharded_weights(chunks)
    keys = [chunk_key(index, len(chunks)) for index in range(len(chunks))]
    _keep_bucket_padding(training.optimizer)
    optimizer = training.optimizer.sharded_state_dict(
        {key: weights[key] for key in keys},
        is_loading=is_loading,
        metadata=sharding_metadata(chunks),
    )
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generators = ShardedObject("random", _random_state(), (world_size,), (rank,), replica_id=0)
    return {**weights, "optimizer": optimizer, "random": generators, "world": _world(training)}


def _keep_bucket_padding(optimizer: MegatronOptimizer) -> None:
    """Without this, megatron-core 0.16.1 saves wrong moments and main weights wherever a bucket ends in padding.

    Its distributed optimizer gathers a buffer without the padding between buckets (`numel_unpadded`), and then cuts
    parameters out of it at offsets that count the padding (`sharded_param_state_fully_reshardable`): every parameter
    behind the first padded bucket is saved shifted, and the last one is filled up with zeros ("param range exceeds
    unpadded buffer ... can lead to data corruption"). A tied embedding has a bucket of its own, and with
    `parallel.overlap_grad_reduce` every 40 million elements begin one. With the padding kept, the offsets are right.
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer):
            for buffer in one.buffers:
                buffer.numel_unpadded = buffer.numel
                for bucket in buffer.buckets:
                    bucket.numel_unpadded = bucket.grad_data.numel()


def _agree_on_step(optimizer: MegatronOptimizer) -> None:
    """Give every rank the number of updates, which rank 0 saves for all and compares with theirs. Collective.

    Adam counts none where a group has no parameter on this rank, as the patch embedding's behind the first pipeline
    stage."""
    taken = max((group.get("step", 0) for group in optimizer.param_groups), default=0)
    step = torch.tensor(taken, device=torch.cuda.current_device())
    torch.distributed.all_reduce(step, op=torch.distributed.ReduceOp.MAX)
    for group in optimizer.param_groups:
        if not group["params"] and step > 0:
            group["step"] = int(step)


def _leave_out_empty_state(optimizer: dict[str, Any]) -> None:
    """The other half of `_restore_empty_state`, so that a rank that trains nothing saves what the others save."""
    for part in (optimizer, optimizer.get("optimizer", {})):
        for key in ("state", "param_state", "fp32_from_fp16_params"):
            if key in part and _holds_nothing(part[key]):
                del part[key]


def _holds_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and all(_holds_nothing(one) for one in value)


def _restore_empty_state(optimizer: dict[str, Any]) -> None:
    """A pipeline stage that trains nothing has no moments. A load leaves them out, and megatron-core wants them."""
    if (
        "optimizer" in optimizer
    ):  # low precision: the moments lie one level deeper, beside the fp32 weights
        optimizer.setdefault("fp32_from_fp16_params", [])
        optimizer = optimizer["optimizer"]
    optimizer.setdefault("state", {})


def _gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """With the overlapped gather each rank holds its own shard's update until the next forward asks for the others'."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _world(training: TrainingState) -> str:
    config = training.chunks[0].config
    return json.dumps(
        [
            torch.distributed.get_world_size(),
            config.tensor_model_parallel_size,
            config.pipeline_model_parallel_size,
            config.virtual_pipeline_model_parallel_size,
            config.context_parallel_size,
        ]
    )


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
