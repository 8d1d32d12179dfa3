# SPDX-License-Identifier: Apache-2.0
"""A run's own checkpoints: everything that the next step depends on, written atomically, verified, and found again.

    RUN_DIR/checkpoints/step_00000100/   tensors, common.pt, config.txt, complete.json (manifest.py; written last)
    RUN_DIR/latest_step                  step of the newest, as text (read by slurm/)

A checkpoint is written to `.tmp-...`, by threads of their own if the training is not to wait, and renamed when every
rank's bytes are on the disk, and an old checkpoint loses its name before its files: at every instant a folder with a
step's name is whole. Contents: weights, optimizer, schedule, random generators, position of the data plan, the run's
configuration. The same layout resumes bitwise; another layout resumes from the same weights, moments and data position,
but with its own random generators (this model draws no random numbers in training).

A resume reads every byte and compares it with the manifest, loads, and compares the canonical tensors in memory. A
damaged checkpoint is named in the log and set aside as `step_00000100.broken`, and the one before is taken.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_eve.checkpoint.canonical import canonical_hashes
from megatron_eve.checkpoint.fit import refuse_non_finite
from megatron_eve.checkpoint.manifest import Manifest
from megatron_eve.checkpoint.training_state import (
    TrainingState,
    layout_of,
    restore,
    saved_state,
    set_random_state,
)
from megatron_eve.checkpoint.verify import (
    DamagedCheckpointError,
    refuse_differences,
    verify_folder,
)
from megatron_eve.checkpoint.writer import Contents, FolderWrite, raise_together
from megatron_eve.data.read.vocabulary import FACT
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import (
    CHECKPOINTS,
    LATEST_STEP_FILE,
    checkpoints_of,
    first_whole,
    newest_first,
    step_name,
)
from megatron_eve.whole import ASIDE_PREFIX, mend_all, replace_folder, write_text

__all__ = ["CheckpointManager", "Resumed", "TrainingState"]
_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_LEFT_OVER = (".tmp-*", ".old-*", f"{ASIDE_PREFIX}*")  # of a killed run


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a checkpoint holds besides tensors."""

    path: Path
    step: int
    data: Mapping[str, Any]  # position of the data plan


@dataclass(frozen=True, slots=True)
class _Pending:
    write: FolderWrite
    step: int


class CheckpointManager:
    """Saves and loads the checkpoints of one run directory. Every method is collective but close()."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_last: int,
        config_text: str,
        keep_every_steps: int | None = None,
        async_save: bool = False,
        stage: str = "",
        vocabulary: Mapping[str, Any] | None = None,
    ) -> None:
        """`keep_every_steps`: checkpoints at its multiples are never removed. `async_save`: save() returns when the
        tensors are copied; poll() after each step, wait() at the end. `vocabulary`: of the run's tokenizer (data/
        vocabulary.py), recorded with each checkpoint by rank 0."""
        self.folder = run_dir / CHECKPOINTS
        self._run_dir, self._config_text, self._stage = run_dir, config_text, stage
        self._vocabulary = {} if vocabulary is None else {FACT: dict(vocabulary)}
        self._keep_last, self._keep_every = keep_last, keep_every_steps
        self._async_save = async_save
        self._is_main = torch.distributed.get_rank() == 0
        self._pending: _Pending | None = None
        self._verified: dict[Path, Manifest | DamagedCheckpointError] = {}
        self._broken: list[Path] = []  # skipped, and not yet set aside

    def save(self, training: TrainingState, *, step: int, data: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps. `data` must be the same on every data leader. Returns the path that it
        has or, in the background, will have.

        Raises: CheckpointError if it cannot be written; older checkpoints stay as they are."""
        self.wait()
        final = self.folder / step_name(step)
        # A killed run's process on another node may still write: no two attempts share a folder.
        attempt = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(attempt, src=0)
        facts = {
            "kind": "training",
            "step": step,
            "stage": self._stage,
            "layout": layout_of(training),
            "distributed_optimizer": training.optimizer.config.use_distributed_optimizer,
            "data": dict(data),
            **self._vocabulary,
        }
        write = FolderWrite(
            self.folder / f".tmp-{final.name}-{attempt[0]}",
            Contents(
                state={**saved_state(training), "step": step, "data": dict(data)},
                config_text=self._config_text,
                facts=facts,
                tensors=canonical_hashes(training.chunks, training.optimizer),
            ),
            replicas=training.chunks[0].pg_collection.dp_cp,
            async_save=self._async_save,
        )
        write.start()
        self._pending = _Pending(write, step)
        if not self._async_save:
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
        pending = self._pending
        try:
            pending.write.finish()
        except CheckpointError:
            self._pending = None  # is removed already; after any other error close() does that
            raise
        self._pending = None
        final = self.folder / step_name(pending.step)
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
        replace_folder(temporary, final=final)
        self._note_step(step)
        for old in list(checkpoints_of(self._run_dir))[: -self._keep_last]:
            if self._keep_every is None or old % self._keep_every:
                _discard(self.folder / step_name(old))

    def _note_step(self, step: int) -> None:
        write_text(self._run_dir / LATEST_STEP_FILE, f"{step}\n")

    def close(self) -> None:
        """After a failure of the run: stop what this rank writes, if anything, and remove it. Not collective; the next
        start removes what other ranks still write."""
        if self._pending is not None:
            self._pending.write.abort()
            self._pending = None

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint. Broken ones are named in the log.

        Raises: CheckpointError if there are checkpoints but none is whole."""
        found = self._first_whole(self._checked)
        return found[0] if found else None

    def resume(self, training: TrainingState) -> Resumed | None:
        """Restore everything from the newest undamaged checkpoint; None if there is none at all. Sets broken ones
        aside.

        Raises: CheckpointError if there are checkpoints but none is usable, or if they do not fit this model and
        optimizer."""
        found = self._first_whole(lambda path: self.load(training, path))
        resumed = found[1] if found else None
        self._tidy_up(resumed)
        return resumed

    def _first_whole(self, use: Callable[[Path], T]) -> tuple[Path, T] | None:
        problems: list[str] = []

        def skip(path: Path, error: CheckpointError) -> None:
            problems.append(str(error))
            if path not in self._broken:
                self._broken.append(path)
                if self._is_main:
                    _LOG.error("skipping a broken checkpoint: %s", error)

        found = first_whole(
            self._candidates(), check=use, damage=DamagedCheckpointError, skipped=skip
        )
        if found is None and problems:
            raise CheckpointError("no usable checkpoint: " + "; ".join(problems))
        return found

    def _candidates(self) -> list[Path]:
        """Checkpoints as rank 0 sees them, the newest first: all ranks must try the same."""
        box: list[list[Path]] = [[]]
        if self._is_main:
            try:
                mend_all(self.folder)
            except OSError as error:
                _LOG.warning("cannot put back what stands aside in %s: %s", self.folder, error)
            box = [newest_first(self._run_dir)]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _checked(self, path: Path) -> Manifest:
        """Every byte is read once. Raises: DamagedCheckpointError."""
        if path not in self._verified:
            try:
                self._verified[path] = verify_folder(path)
            except DamagedCheckpointError as error:
                self._verified[path] = error
        found = self._verified[path]
        if isinstance(found, DamagedCheckpointError):
            raise found
        return found

    def _tidy_up(self, resumed: Resumed | None) -> None:
        """Write the loaded step for the launcher, set broken checkpoints aside, and remove what a killed run left. No
        failure here ends the run."""
        if self._is_main:
            try:
                if resumed is not None:
                    self._note_step(resumed.step)
                for path in self._broken:
                    os.replace(path, _free_name(path.with_name(f"{path.name}.broken")))
                for pattern in _LEFT_OVER:
                    for path in self.folder.glob(pattern):
                        shutil.rmtree(path, ignore_errors=True)
            except OSError as error:
                _LOG.warning("cannot tidy up %s: %s", self.folder, error)
        self._broken.clear()
        torch.distributed.barrier()

    def load(self, training: TrainingState, path: Path) -> Resumed:
        """Restore everything from `path`. Raises: CheckpointError if it does not fit this model and optimizer,
        DamagedCheckpointError if it is not what was written."""
        manifest = self._checked(path)
        _refuse_other_optimizer(training.optimizer, manifest, path=path)
        loaded, same_layout = restore(training, path)
        if manifest.tensors:  # old checkpoints have none
            found = canonical_hashes(training.chunks, training.optimizer)
            refuse_differences(found, manifest.tensors, folder=path)
        refuse_non_finite(training.chunks, source=path)
        if same_layout:
            set_random_state(loaded["random"])
        elif self._is_main:
            _LOG.warning("%s was written by another layout: random generators start anew", path)
        return Resumed(path=path, step=loaded["step"], data=loaded["data"])


def _refuse_other_optimizer(
    optimizer: MegatronOptimizer, manifest: Manifest, *, path: Path
) -> None:
    """megatron-core names the state of its two kinds of optimizers differently."""
    here = optimizer.config.use_distributed_optimizer
    stored = manifest.facts.get("distributed_optimizer", here)
    if stored != here:
        raise CheckpointError(
            f"{path} was written with parallel.distributed_optimizer={str(stored).lower()}, this run has "
            f"{str(here).lower()}; set it as it was, any other layout of the processes may change"
        )


def _discard(path: Path) -> None:
    """Take a checkpoint's name away before its files, so that its name never stands for half of it."""
    old = path.with_name(f".old-{path.name}-{uuid.uuid4().hex[:8]}")
    os.replace(path, old)
    shutil.rmtree(old, ignore_errors=True)


def _free_name(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.broken')[0]}.broken{number}")
    return path
