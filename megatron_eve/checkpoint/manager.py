# SPDX-License-Identifier: Apache-2.0
"""A run's own checkpoints: everything that the next step depends on, written atomically and found again.

    RUN_DIR/checkpoints/step_00000100/   tensors, common.pt, config.txt, complete.json (written last)
    RUN_DIR/checkpoints/latest           name of the newest complete one, as text
    RUN_DIR/latest_step                  its step, as text (read by slurm/)

A checkpoint is written to `.tmp-step_...`, and renamed when every rank's bytes are on disk: a folder with a step's name
is whole. Contents: weights, optimizer, schedule, random generators, position of the data plan, the run's configuration.
The same layout resumes bitwise; another layout resumes from the same weights, moments and data position, but with its
own random generators (this model draws no random numbers in training).
"""

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eve.checkpoint.weights import (
    LOAD_ERRORS,
    check_folder,
    chunk_key,
    finish_folder,
    load_chunks,
    prepare_folder,
    sharded_weights,
    sharding_metadata,
    write_atomically,
)
from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel

_LOG = logging.getLogger(__name__)
LATEST_STEP_FILE = "latest_step"
_STEP_FOLDER = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The live objects that a checkpoint saves and restores."""

    chunks: Sequence[EveModel]
    model: Sequence[DistributedDataParallel]  # the same chunks, wrapped
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a checkpoint says besides tensors."""

    step: int
    data: Mapping[str, Any]  # position of the data plan


class CheckpointManager:
    """Saves and loads the checkpoints of one run directory. Every method is collective."""

    def __init__(self, run_dir: Path, *, keep_last: int, config_text: str) -> None:
        self.folder = run_dir / "checkpoints"
        self._run_dir, self._keep_last, self._config_text = run_dir, keep_last, config_text
        self._is_main = torch.distributed.get_rank() == 0

    def save(
        self,
        training: TrainingState,
        *,
        step: int,
        data: Mapping[str, Any],
    ) -> Path:
        """Write the state after `step` steps and publish it. `data` must be the same on every data leader.

        Raises: CheckpointError if the folder cannot be written; older checkpoints stay as they are."""
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        if self._is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        torch.distributed.barrier()
        prepare_folder(temporary)
        _gather_parameters(training.model)
        dist_checkpointing.save(
            {
                **self._sharded(training, is_loading=False),
                "schedule": training.schedule.state_dict(),
                "step": step,
                "data": dict(data),
            },
            str(temporary),
        )
        finish_folder(
            temporary, config_text=self._config_text, facts={"kind": "training", "step": step}
        )
        if self._is_main:
            self._publish(temporary, final, step=step)
        torch.distributed.barrier()
        return final

    def _publish(self, temporary: Path, final: Path, *, step: int) -> None:
        shutil.rmtree(final, ignore_errors=True)  # of a run that stopped at the same step before
        os.replace(temporary, final)
        _sync_folder(self.folder)
        write_atomically(self.folder / "latest", final.name + "\n")
        write_atomically(self._run_dir / LATEST_STEP_FILE, f"{step}\n")
        for old in self.complete_steps()[: -self._keep_last]:
            shutil.rmtree(self.folder / f"step_{old:08d}", ignore_errors=True)

    def complete_steps(self) -> list[int]:
        """Steps that have a folder with a final name, ascending."""
        if not self.folder.is_dir():
            return []
        names = [_STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match.group(1)) for match in names if match)

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are all there; the decision is rank 0's. Broken ones are named in the log.

        Raises: CheckpointError if there are checkpoints but none is whole."""
        box: list[Any] = [None, None]
        if self._is_main:
            box = self._newest_here()
        torch.distributed.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise CheckpointError(box[1])
        return box[0]

    def _newest_here(self) -> list[Any]:
        steps = self.complete_steps()
        problems = []
        for step in reversed(steps):
            path = self.folder / f"step_{step:08d}"
            try:
                check_folder(path)
                return [path, None]
            except CheckpointError as error:
                problems.append(str(error))
                _LOG.error("skipping a broken checkpoint: %s", error)
        return [None, "no usable checkpoint: " + "; ".join(problems)] if steps else [None, None]

    def load(self, training: TrainingState, path: Path) -> Resumed:
        """Restore everything from `path`. Raises: CheckpointError if it does not fit this model and optimizer."""
        check_folder(path)
        wanted = self._sharded(training, is_loading=True)
        same_layout = dist_checkpointing.load_common_state_dict(str(path))["world"] == _world(
            training
        )
        if not same_layout:
            _LOG.warning("%s was written by another layout: random generators start anew", path)
            del wanted["random"]
        try:
            loaded = dist_checkpointing.load(
                wanted, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED
            )
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"cannot resume from {path}: {error}. At a change of stage or model start a new run directory with "
                "checkpoint.load_weights_from instead"
            ) from error
        load_chunks(training.chunks, loaded)
        limits = [(group["max_lr"], group["min_lr"]) for group in training.optimizer.param_groups]
        if not training.optimizer.config.use_distributed_optimizer:
            _restore_empty_state(loaded["optimizer"])
        training.optimizer.load_state_dict(loaded["optimizer"])
        # The learning rate is the configuration's, not the checkpoint's: a run may be lengthened.
        for group, (max_lr, min_lr) in zip(training.optimizer.param_groups, limits, strict=True):
            group["max_lr"], group["min_lr"] = max_lr, min_lr
        training.schedule.load_state_dict(loaded["schedule"])
        if same_layout:
            _set_random_state(loaded["random"])
        return Resumed(step=loaded["step"], data=loaded["data"])

    def _sharded(self, training: TrainingState, *, is_loading: bool) -> dict[str, Any]:
        chunks = training.chunks
        weights = sharded_weights(chunks)
        keys = [chunk_key(index, len(chunks)) for index in range(len(chunks))]
        optimizer = training.optimizer.sharded_state_dict(
            {key: weights[key] for key in keys},
            is_loading=is_loading,
            metadata=sharding_metadata(chunks),
        )
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        generators = ShardedObject("random", _random_state(), (world_size,), (rank,), replica_id=0)
        return {**weights, "optimizer": optimizer, "random": generators, "world": _world(training)}


def _restore_empty_state(optimizer: dict[str, Any]) -> None:
    """A pipeline stage that trains nothing has no moments; a load leaves out what is empty, megatron-core wants it."""
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


def _set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
