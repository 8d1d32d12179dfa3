# SPDX-License-Identifier: Apache-2.0
"""Writes a sharded state dict to a folder in megatron-core's torch_dist format, while training goes on if asked to.

megatron-core plans. We write: on each rank one thread writes one file and reads it back for its hash; writing and
hashing leave the interpreter to the training. megatron-core 0.16.1's own writer forks, and a process forked while other
threads run may hang at once (docs/checkpoints.md); if it dies, or the disk is full on rank 0, the run waits for ever.
Here every failure reaches every rank as one CheckpointError.
"""

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_eve.checkpoint.canonical import TensorHash
from megatron_eve.checkpoint.manifest import (
    FileEntry,
    Manifest,
    file_entry,
    write_manifest,
)
from megatron_eve.checkpoint.sharding import spread_over_replicas
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import CONFIG
from megatron_eve.whole import sync_path, write_text

_GIB = 1 << 30
_LOG = logging.getLogger(__name__)
_STOP_S = 10.0  # a disk that hangs must not keep a process whose run has failed
_SLOW_S = 120.0  # a checkpoint that takes longer gets a line, the next after twice the time
_SPARE_BYTES = 64 << 20  # headers, metadata and what the file system itself needs


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint folder will hold."""

    state: Mapping[str, Any]  # sharded state dict, and the state that all ranks share
    config_text: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, TensorHash]


@dataclass(slots=True)
class _Written:
    """What a rank wrote: torch's results and the file, or the error."""

    results: list[Any] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    problem: str | None = None


class _ShardWriter(FileSystemWriterAsync):
    """One file a rank: planned, then bring_to_host(), then write(), which may run in another thread."""

    items: list[tuple[WriteItem, Any]]
    file: Path | None = None

    def __init__(self, folder: Path, *, copy: bool) -> None:
        """`copy`: take copies, so that later changes of the tensors do not reach the file."""
        super().__init__(str(folder))
        self.stopped = threading.Event()
        self._copy = copy

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]
        if self.items:
            self.file = Path(self.path) / f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"

    def bring_to_host(self) -> None:
        self.items = [(item, _on_cpu(data, copy=self._copy)) for item, data in self.items]

    @property
    def num_bytes(self) -> int:
        return sum(
            data.nbytes if torch.is_tensor(data) else data.getbuffer().nbytes
            for _, data in self.items
        )

    def write(self) -> _Written:
        """Write this rank's file to the disk, and hash it as it is read back."""
        if self.file is None:
            return _Written()
        try:
            with open(self.file, "wb") as stream:
                results = [self._write_item(stream, item, data) for item, data in self.items]
                self.items = []  # gives the copies back
                stream.flush()
                os.fsync(stream.fileno())
            return _Written(results, {self.file.name: file_entry(self.file)})
        except Exception as error:
            return _Written(problem=_told(error, self.file))

    def _write_item(self, stream: Any, item: WriteItem, data: Any) -> Any:
        assert self.file is not None
        if self.stopped.is_set():
            raise CheckpointError("writing was stopped")
        return filesystem._write_item(
            self.transforms, stream, data, item, self.file.name, SerializationFormat.TORCH_SAVE
        )


def _on_cpu(data: Any, *, copy: bool) -> Any:
    if not torch.is_tensor(data):
        return data
    data = data.detach()
    if data.device.type != "cpu":
        return data.to("cpu")
    is_view = data.untyped_storage().nbytes() != data.nbytes  # torch.save would write all of it
    return data.clone() if copy or is_view else data


def _told(error: BaseException, path: Path | str) -> str:
    """One clause about an error on writing `path`; torch hides the disk's own error behind others."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return f"{path}: {os.strerror(link.errno)}"
        link = link.__cause__ or link.__context__
    return f"{path}: {type(error).__name__}: {error}"


class FolderWrite:
    """A checkpoint folder on its way to the disk: start() it, ask is_done(), then finish(); these are collective.

    Raises: CheckpointError, on every rank, with the first rank's reason; the folder is then removed."""

    def __init__(
        self,
        folder: Path,
        contents: Contents,
        *,
        replicas: ProcessGroup,
        async_save: bool = False,
    ) -> None:
        """`replicas`: ranks that hold the same shards and share the writing. `async_save`: the tensors may change
        after start()."""
        self.folder, self._contents, self._replicas = folder, contents, replicas
        self._writer = _ShardWriter(folder, copy=async_save)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._written: Future[_Written] | None = None
        self._is_main = torch.distributed.get_rank() == 0
        self._is_ours = False  # an earlier folder is not removed

    def start(self) -> None:
        """Plan, copy, and begin to write."""
        self._agree(self._make_folder())
        sharded, common = save_preprocess(dict(self._contents.state))
        # The distributed optimizer's part is gathered in host memory, whole on every rank: free it soon.
        self._contents = replace(self._contents, state={})
        self._agree(self._save_common(common))
        spread_over_replicas(sharded, self._replicas)
        self._plan(sharded)
        self._agree(self._missing_space())
        self._written = self._begin()

    def _make_folder(self) -> str | None:
        if not self._is_main:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()):
                return f"{self.folder} is not empty; remove it or choose another folder"
            self._is_ours = True
        except OSError as error:
            return f"cannot write to {_told(error, self.folder)}"
        return None

    def _save_common(self, common: dict[str, Any]) -> str | None:
        if not self._is_main:
            return None
        path = self.folder / COMMON_STATE_FNAME
        try:
            with open(path, "wb") as stream:
                torch.save(common, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except Exception as error:
            return _told(error, path)
        return None

    def _plan(self, sharded: Any) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        (_, self._metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key),
            self._writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

    def _missing_space(self) -> str | None:
        """A disk that is known to be too small is not filled first. Quotas show only when they are hit."""
        total = torch.tensor(self._writer.num_bytes, device=torch.cuda.current_device())
        torch.distributed.all_reduce(total)
        needed = int(total.item()) + _SPARE_BYTES
        free = shutil.disk_usage(self.folder).free if self._is_main else needed
        if free >= needed:
            return None
        return (
            f"{self.folder.parent}: {os.strerror(errno.ENOSPC)}: a checkpoint needs {needed / _GIB:.2f} GiB, "
            f"{free / _GIB:.2f} GiB are free"
        )

    def _begin(self) -> Future[_Written]:
        """Copy, and write in the thread. If one rank lacks the memory, all learn of it in finish()."""
        try:
            self._writer.bring_to_host()
            return self._thread.submit(self._writer.write)
        except Exception as error:
            part = f"rank {torch.distributed.get_rank()}'s part"
            failed: Future[_Written] = Future()
            failed.set_result(_Written(problem=_told(error, part)))
            return failed

    def is_done(self) -> bool:
        """Whether every rank's writing has ended, well or not."""
        assert self._written is not None, "start() first"
        waiting = not self._written.done()
        flag = torch.tensor(int(waiting), device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return not flag.item()

    def finish(self) -> None:
        """Wait for every rank's bytes, then write the files that make the folder a checkpoint, complete.json last."""
        assert self._written is not None, "start() first"
        self._wait_for_disks()
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self._written.result())
        if problem := next((rank.problem for rank in everyone if rank.problem), None):
            self._fail(problem)
        self._agree(self._complete(everyone) if self._is_main else None)

    def _wait_for_disks(self) -> None:
        """Ask all ranks again and again: a collective, which has a time limit, must not wait for a disk."""
        began, pause, told_at = time.monotonic(), 0.002, _SLOW_S
        while not self.is_done():
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            seconds = time.monotonic() - began
            if self._is_main and seconds > told_at:
                _LOG.warning("%s is still being written after %.0f s", self.folder, seconds)
                told_at *= 2

    def _complete(self, everyone: list[_Written]) -> str | None:
        path = self.folder
        try:
            self._writer.finish(self._metadata, [rank.results for rank in everyone])
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            write_text(self.folder / CONFIG, self._contents.config_text)
            files = {name: entry for rank in everyone for name, entry in rank.files.items()}
            for path in sorted(self.folder.iterdir()):
                if path.name not in files:
                    files[path.name] = file_entry(path)
            missing = [name for name in files if not (self.folder / name).exists()]
            if missing:
                return (
                    f"rank 0 does not see {self.folder / missing[0]}, which another rank wrote; a run directory "
                    "must be on a file system that all nodes share"
                )
            manifest = Manifest(
                facts=self._contents.facts,
                files=dict(sorted(files.items())),
                tensors=self._contents.tensors,
            )
            write_manifest(self.folder, manifest)
            sync_path(self.folder)
        except Exception as error:
            return _told(error, path)
        return None

    def _agree(self, problem: str | None) -> None:
        """Go on if no rank has a problem."""
        try:
            raise_together(problem)
        except CheckpointError as error:
            self._fail(str(error))

    def _fail(self, problem: str) -> NoReturn:
        """Remove a folder that cannot be completed."""
        self.abort()
        raise CheckpointError(
            f"checkpoint not saved: {problem}. Earlier checkpoints are as they were"
        )

    def abort(self) -> None:
        """Stop writing and remove the folder; on a disk that hangs, leave it. Not collective."""
        self._writer.stopped.set()
        is_stopped = self._written is None or bool(wait([self._written], timeout=_STOP_S).done)
        self._thread.shutdown(wait=is_stopped)
        if self._is_ours and is_stopped:
            shutil.rmtree(self.folder, ignore_errors=True)


def raise_together(problem: str | None) -> None:
    """Raise on every rank if any has a problem. Collective. Raises: CheckpointError with the first one."""
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
