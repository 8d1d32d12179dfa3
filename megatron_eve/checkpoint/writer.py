# SPDX-License-Identifier: Apache-2.0
"""Brings a sharded state dict to a folder in megatron-core's torch_dist format, while training goes on if asked to.

Planning is megatron-core's. The writing is ours: one forked process a rank writes one file, reads it back for its hash,
and sends what it did through a pipe. One that hangs is replaced. megatron-core's own writer forks two processes more
for that, and starts a `multiprocessing` manager that imports the program again; a writer that dies makes it wait for
ever, and a disk that is full on rank 0 makes the other ranks wait. Here every failure reaches every rank as one
CheckpointError.
"""

import errno
import gc
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_eve.checkpoint.canonical import TensorHash
from megatron_eve.checkpoint.manifest import (
    CONFIG,
    FileEntry,
    Manifest,
    file_entry,
    sync_path,
    write_atomically,
    write_manifest,
)
from megatron_eve.errors import CheckpointError

_LOG = logging.getLogger(__name__)
_GIB = 1 << 30
_LOOK_S, _HANGS_AFTER_S = 1.0, 60.0
"""A forked process inherits the locks that its parent's other threads held, for ever. Whoever waits for one computes
nothing and waits for no disk: after so many seconds it is given up."""
_SPARE_BYTES = 64 << 20  # headers, metadata and what the file system itself needs


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint folder will hold."""

    state: Mapping[str, Any]  # sharded state dict, and what is the same on every rank
    config_text: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, TensorHash]


@dataclass(slots=True)
class _Written:
    """What a rank's process did: torch's results and the file, or why not."""

    results: list[Any] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    problem: str | None = None


class _ShardWriter(FileSystemWriterAsync):
    """One file a rank. Planning brings the tensors to the CPU; write() may then run in a forked process."""

    items: list[tuple[WriteItem, Any]]
    file: Path | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = [(item, _on_cpu(planner.resolve_data(item))) for item in plan.items]
        if self.items:
            self.file = Path(self.path) / f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"

    @property
    def num_bytes(self) -> int:
        return sum(
            data.nbytes if torch.is_tensor(data) else data.getbuffer().nbytes
            for _, data in self.items
        )

    def write(self) -> _Written:
        """This rank's file, on the disk, and its hash as it is read back."""
        if self.file is None:
            return _Written()
        try:
            with open(self.file, "wb") as stream:
                results = [self._write_item(stream, item, data) for item, data in self.items]
                stream.flush()
                os.fsync(stream.fileno())
            return _Written(results, {self.file.name: file_entry(self.file)})
        except Exception as error:
            return _Written(problem=_told(error, self.file))

    def _write_item(self, stream: Any, item: WriteItem, data: Any) -> Any:
        assert self.file is not None
        return filesystem._write_item(
            self.transforms, stream, data, item, self.file.name, SerializationFormat.TORCH_SAVE
        )


def _on_cpu(data: Any) -> Any:
    if not torch.is_tensor(data):
        return data
    data = data.detach()
    if data.device.type != "cpu":
        return data.to("cpu")
    # torch.save writes the whole storage; the copy is made here because it may use threads that a fork has not.
    is_view = data.untyped_storage().nbytes() != data.nbytes
    return data.clone() if is_view else data


def _told(error: BaseException, path: Path) -> str:
    """One clause about an error on writing `path`; torch hides the disk's own error behind others."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            return f"{path}: {os.strerror(link.errno)}"
        link = link.__cause__ or link.__context__
    return f"{path}: {type(error).__name__}: {error}"


class FolderWrite:
    """A checkpoint folder on its way to the disk: start() it, ask is_done(), then finish(). Each is collective.

    Raises: CheckpointError, on every rank, with the first rank's reason; the folder is then removed."""

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self._contents = folder, contents
        self._process: Any = None
        self._pipe: Any = None
        self._written: _Written | None = None
        self._is_main = torch.distributed.get_rank() == 0
        self._is_ours = False  # a folder that was there before is not removed

    def start(self, *, in_background: bool) -> None:
        """Plan, and write all; in the background the call returns when the tensors are safe from further training."""
        self._agree(self._make_folder())
        sharded, common = save_preprocess(dict(self._contents.state))
        self._agree(self._save_common(common))
        self._plan(sharded)
        self._agree(self._missing_space())
        if in_background:
            self._fork()
        else:
            self._written = self._writer.write()

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
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key),
            _ShardWriter(str(self.folder)),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self._writer, self._metadata, _ = planned

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

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write_in_child, args=(self._writer, theirs), name="checkpoint-writer"
        )
        self._process.start()
        theirs.close()

    def is_done(self) -> bool:
        """Whether every rank's process has come to an end, in success or not."""
        waiting = int(self._written is None and not self._pipe.poll())
        flag = torch.tensor(waiting, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return not flag.item()

    def finish(self) -> None:
        """Wait for every rank's bytes, then write what makes the folder a checkpoint; complete.json last."""
        written = self._result()
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, written)
        if problem := next((rank.problem for rank in everyone if rank.problem), None):
            self._fail(problem)
        self._agree(self._complete(everyone) if self._is_main else None)

    def _result(self) -> _Written:
        if self._written is None:
            if self._hangs():
                _LOG.warning(
                    "the process that writes %s does nothing; it is stopped and the file is written without it",
                    self._writer.file,
                )
                self._stop_process()
                self._written = self._writer.write()
            else:
                self._written = self._received()
        return self._written

    def _hangs(self) -> bool:
        """Wait until the process has something to say; True: it does nothing any more."""
        seen, since = _activity(self._process.pid), time.monotonic()
        while not self._pipe.poll(_LOOK_S):
            now = _activity(self._process.pid)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > _HANGS_AFTER_S:
                return True
        return False

    def _received(self) -> _Written:
        try:
            written: _Written = self._pipe.recv()  # before join(): a full pipe holds the process
        except EOFError:
            self._process.join()
            return _Written(
                problem=f"the process that writes rank {torch.distributed.get_rank()}'s part ended with "
                f"exit code {self._process.exitcode}"
            )
        self._process.join(_HANGS_AFTER_S)  # its work is done, however it ends
        self._stop_process()
        return written

    def _complete(self, everyone: list[_Written]) -> str | None:
        path = self.folder
        try:
            self._writer.finish(self._metadata, [rank.results for rank in everyone])
            save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
            write_atomically(self.folder / CONFIG, self._contents.config_text)
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
        """A folder that cannot be completed gives its space back."""
        self.abort()
        raise CheckpointError(
            f"checkpoint not saved: {problem}. Earlier checkpoints are as they were"
        )

    def abort(self) -> None:
        """Stop writing and remove the folder."""
        self._stop_process()
        if self._is_ours:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _stop_process(self) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()


def _activity(pid: int) -> object:
    """Changes while a process computes or waits for a disk. Source: proc(5), /proc/PID/stat."""
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.monotonic() if state == "D" else tuple(fields[10:12])  # user and system time


def _write_in_child(writer: _ShardWriter, pipe: Any) -> None:
    gc.disable()  # the collector would touch device tensors that belong to the parent
    pipe.send(writer.write())
    pipe.close()


def raise_together(problem: str | None) -> None:
    """Raise on every rank if any has a problem. Collective. Raises: CheckpointError with the first one."""
    problems: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
