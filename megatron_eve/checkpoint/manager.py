# SPDX-License-Identifier: Apache-2.0
"""A run's own checkpoints: everything that the next step depends on, written atomically, verified, and found again.

    RUN_DIR/checkpoints/step_00000100/   tensors, common.pt, config.txt, complete.json (manifest.py; written last)
    RUN_DIR/checkpoints/latest           name of the newest complete one, as text
    RUN_DIR/latest_step                  its step, as text (read by slurm/)

A checkpoint is written to `.tmp-...`, by processes of its own if the training is not to wait, and renamed when every
rank's bytes are on the disk: a folder with a step's name is whole. `latest` is replaced after that, and an old
checkpoint loses its name before its files, so at every instant `latest` names a whole one. Contents: weights,
optimizer, schedule, random generators, position of the data plan, the run's configuration. The same layout resumes
bitwise; another layout resumes from the same weights, moments and data position, but with its own random generators
(this model draws no random numbers in training).

A resume reads every byte and compares it with the manifest, loads, and compares the canonical tensors in memory. What
is not as it was written is named in the log, set aside as `step_00000100.broken`, and the checkpoint before is taken.
"""

import json
import logging
import os
import random
import re
import shutil
import uuid
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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.manifest import Manifest, sync_folder, write_atomically
from megatron_eve.checkpoint.sharding import chunk_key, sharded_weights, sharding_metadata
from megatron_eve.checkpoint.verify import (
    DamagedCheckpointError,
    refuse_differences,
    verify_folder,
)
from megatron_eve.checkpoint.weights import LOAD_ERRORS, load_chunks
from megatron_eve.checkpoint.writer import Contents, FolderWrite, raise_together
from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel

_LOG = logging.getLogger(__name__)
LATEST_STEP_FILE = "latest_step"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step_(\d{8})")
_LEFT_OVER = (".tmp-*", ".old-*")  # of a run that was killed


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

    path: Path
    step: int
    data: Mapping[str, Any]  # position of the data plan


@dataclass(frozen=True, slots=True)
class _Pending:
    write: FolderWrite
    step: int


class CheckpointManager:
    """Saves and loads the checkpoints of one run directory. Every method is collective."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        config_text: str,
        keep_every_steps: int | None = None,
        in_background: bool = False,
        stage: str = "",
    ) -> None:
        """`keep_every_steps`: checkpoints of its multiples are never removed. `in_background`: save() returns when the
        tensors are copied; poll() after each step, wait() at the end."""
        self.folder = run_dir / "checkpoints"
        self._run_dir, self._config_text, self._stage = run_dir, config_text, stage
        self._keep_last, self._keep_every = keep_last, keep_every_steps
        self._in_background = in_background
        self._is_main = torch.distributed.get_rank() == 0
        self._pending: _Pending | None = None
        self._verified: dict[Path, Manifest | CheckpointError] = {}

    def save(self, training: TrainingState, *, step: int, data: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps. `data` must be the same on every data leader. Returns the path that it
        has or, in the background, will have.

        Raises: CheckpointError if it cannot be written; older checkpoints stay as they are."""
        self.wait()
        final = self.folder / f"step_{step:08d}"
        # A writer of a run that was killed may still be alive: no two attempts share a folder.
        attempt = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(attempt, src=0)
        _gather_parameters(training.model)
        state = {
            **self._sharded(training, is_loading=False),
            "schedule": training.schedule.state_dict(),
            "step": step,
            "data": dict(data),
        }
        facts = {
            "kind": "training",
            "step": step,
            "stage": self._stage,
            "layout": json.loads(_world(training)),
            "data": dict(data),
        }
        tensors = canonical_hashes(training.chunks, training.optimizer)
        write = FolderWrite(
            self.folder / f".tmp-{final.name}-{attempt[0]}",
            Contents(state=state, config_text=self._config_text, facts=facts, tensors=tensors),
        )
        write.start(in_background=self._in_background)
        self._pending = _Pending(write, step)
        if not self._in_background:
            self.wait()
        return final

    def poll(self) -> Path | None:
        """Publish what is being written if all its bytes are on the disk; its path then. Raises: see save()."""
        if self._pending is None or not self._pending.write.is_done():
            return None
        return self.wait()

    def wait(self) -> Path | None:
        """Publish what is being written, if anything, however long that takes. Raises: see save()."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        pending.write.finish()
        final = self.folder / f"step_{pending.step:08d}"
        problem = None
        if self._is_main:
            try:
                self._publish(pending.write.folder, final, step=pending.step)
            except OSError as error:
                shutil.rmtree(pending.write.folder, ignore_errors=True)
                problem = f"cannot publish {final}: {error}. Earlier checkpoints are as they were"
        raise_together(problem)
        if self._is_main:
            _LOG.info("saved %s", final)
        return final

    def _publish(self, temporary: Path, final: Path, *, step: int) -> None:
        if final.exists():
            _discard(final)
        os.replace(temporary, final)
        sync_folder(self.folder)
        self._point_to(final, step=step)
        steps = self.complete_steps()
        for old in steps[: -self._keep_last]:
            if self._keep_every is None or old % self._keep_every:
                _discard(self.folder / f"step_{old:08d}")

    def _point_to(self, final: Path, *, step: int) -> None:
        write_atomically(self.folder / LATEST, final.name + "\n")
        write_atomically(self._run_dir / LATEST_STEP_FILE, f"{step}\n")

    def complete_steps(self) -> list[int]:
        """Steps that have a folder with a final name, ascending."""
        if not self.folder.is_dir():
            return []
        names = [_STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match.group(1)) for match in names if match)

    def newest(self) -> Path | None:
        """The newest checkpoint whose bytes are those that were written. Broken ones are named in the log.

        Raises: CheckpointError if there are checkpoints but none is whole."""
        problems: list[str] = []
        for path in self._candidates():
            if self._is_whole(path, problems):
                return path
        if problems:
            raise CheckpointError("no usable checkpoint: " + "; ".join(problems))
        return None

    def _candidates(self) -> list[Path]:
        """Rank 0's view, the newest first: ranks must not differ in what they try."""
        box: list[Any] = [self.complete_steps() if self._is_main else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return [self.folder / f"step_{step:08d}" for step in reversed(box[0])]

    def _is_whole(self, path: Path, problems: list[str]) -> bool:
        if path not in self._verified:
            try:
                self._verified[path] = verify_folder(path)
            except DamagedCheckpointError as error:
                self._verified[path] = error
                self._log_skipped(error)
        found = self._verified[path]
        if isinstance(found, Manifest):
            return True
        problems.append(str(found))
        return False

    def _log_skipped(self, error: CheckpointError) -> None:
        if self._is_main:
            _LOG.error("skipping a broken checkpoint: %s", error)

    def resume(self, training: TrainingState) -> Resumed | None:
        """Restore everything from the newest checkpoint that is what was written; None if there is none at all.

        Broken ones are set aside. Raises: CheckpointError if there are checkpoints but none is usable, or if they do
        not fit this model and optimizer."""
        problems: list[str] = []
        broken: list[Path] = []
        for path in self._candidates():
            try:
                if self._is_whole(path, problems):
                    resumed = self.load(training, path)
                    self._tidy_up(resumed, broken)
                    return resumed
            except DamagedCheckpointError as error:
                problems.append(str(error))
                self._log_skipped(error)
            broken.append(path)
        if problems:
            raise CheckpointError("no usable checkpoint: " + "; ".join(problems))
        self._tidy_up(None, [])
        return None

    def _tidy_up(self, resumed: Resumed | None, broken: Sequence[Path]) -> None:
        """Let `latest` name what was loaded, and remove what a killed run left. Nothing here is worth failing for."""
        if self._is_main:
            try:
                if resumed is not None:
                    self._mend_latest(resumed)
                for path in broken:
                    os.replace(path, _free_name(path.with_name(f"{path.name}.broken")))
                for pattern in _LEFT_OVER:
                    for path in self.folder.glob(pattern):
                        shutil.rmtree(path, ignore_errors=True)
            except OSError as error:
                _LOG.warning("cannot tidy up %s: %s", self.folder, error)
        torch.distributed.barrier()

    def _mend_latest(self, resumed: Resumed) -> None:
        path = self.folder / LATEST
        named = path.read_text().strip() if path.exists() else "nothing"
        if named != resumed.path.name:
            _LOG.warning("%s names %s; corrected to %s", path, named, resumed.path.name)
        self._point_to(resumed.path, step=resumed.step)

    def load(self, training: TrainingState, path: Path) -> Resumed:
        """Restore everything from `path`. Raises: CheckpointError if it does not fit this model and optimizer,
        DamagedCheckpointError if it is not what was written."""
        known = self._verified.get(path)
        manifest = known if isinstance(known, Manifest) else verify_folder(path)
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
        if manifest.tensors:  # there are none in checkpoints of before
            found = canonical_hashes(training.chunks, training.optimizer)
            refuse_differences(found, manifest.tensors, folder=path)
        if same_layout:
            _set_random_state(loaded["random"])
        return Resumed(path=path, step=loaded["step"], data=loaded["data"])

    def _sharded(self, training: TrainingState, *, is_loading: bool) -> dict[str, Any]:
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


def _discard(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that no half of it is ever found under it."""
    old = path.with_name(f".old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.replace(path, old)
    shutil.rmtree(old, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.broken')[0]}.broken{number}")
    return path
