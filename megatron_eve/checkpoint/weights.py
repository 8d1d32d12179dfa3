# SPDX-License-Identifier: Apache-2.0
"""Model weights in megatron-core's distributed checkpoint format, written in one layout and read in any other.

A weights folder holds `config.txt` (the run or model that wrote it), the tensors, and `complete.json`, written last:
a folder without it is not a checkpoint. Keys are the parameter names of EveModel, with the decoder's layers stacked
along a leading axis.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel

LOAD_ERRORS = (
    CheckpointingException,
    CheckpointException,
    KeyError,
    ValueError,
    AssertionError,
)
"""What a load of tensors that do not fit raises; torch's CheckpointException is a BaseException."""

_LOG = logging.getLogger(__name__)
COMPLETE = "complete.json"
CONFIG = "config.txt"
_VISION, _TEXT = ".vision.", ".text."


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


def save_weights(chunks: Sequence[EveModel], folder: str | Path, *, config_text: str) -> None:
    """Write the weights of all ranks to `folder`, which must not exist or be empty. Collective.

    Raises: CheckpointError if there is something in the folder already.
    """
    folder = Path(folder)
    prepare_folder(folder)
    dist_checkpointing.save(sharded_weights(chunks), str(folder))
    finish_folder(folder, config_text=config_text, facts={"kind": "weights"})


def prepare_folder(folder: Path) -> None:
    """Create an empty folder on rank 0 and let every rank know whether that worked. Collective."""
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                problem = [f"{folder} is not empty; remove it or choose another folder"]
        except OSError as error:
            problem = [f"cannot write to {folder}: {error}"]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])


def finish_folder(folder: Path, *, config_text: str, facts: dict[str, Any]) -> None:
    """Write config.txt and, last, complete.json. Collective: returns when the folder is complete for every rank."""
    if torch.distributed.get_rank() == 0:
        (folder / CONFIG).write_text(config_text)
        sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
        write_atomically(folder / COMPLETE, json.dumps({**facts, "files": sizes}, indent=1))
    torch.distributed.barrier()


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file; after a crash it holds the old or the new text."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_folder(folder: str | Path) -> dict[str, Any]:
    """The facts of a complete checkpoint folder.

    Raises: CheckpointError that says what is missing: the folder, complete.json, a file, or bytes of a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    try:
        facts = json.loads((folder / COMPLETE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint ({COMPLETE}: {error}); it was interrupted while being "
            "written or is not ours; use another checkpoint"
        ) from error
    for name, size in facts["files"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            raise CheckpointError(
                f"{path}: found {found} bytes, {COMPLETE} says {size}; use another checkpoint"
            )
    return facts


def weights_folder(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest whole checkpoint if it is a run directory."""
    path = Path(path)
    candidates = sorted((path / "checkpoints").glob("step_" + "[0-9]" * 8), reverse=True)
    for candidate in candidates:
        try:
            check_folder(candidate)
        except CheckpointError as error:
            _LOG.error("skipping a broken checkpoint: %s", error)
        else:
            return candidate
    return path


def read_config_text(folder: str | Path) -> str:
    """The resolved configuration of the run or model that wrote the checkpoint."""
    return (weights_folder(folder) / CONFIG).read_text()


def load_weights(
    chunks: Sequence[EveModel], folder: str | Path, *, copy_text_to_vision: bool
) -> None:
    """Load weights written in any layout into these chunks. `folder`: see weights_folder. Collective.

    With `copy_text_to_vision`, a component that is split here but not in the checkpoint gets the checkpoint's weight in
    both branches (between stages 1 and 2.1; official repeat_moe.py:160-172).

    Raises: CheckpointError if the folder is incomplete, or names the tensors that are missing or of another shape.
    """
    folder = weights_folder(folder)
    check_folder(folder)
    sharded = sharded_weights(chunks)
    stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
    if copy_text_to_vision:
        vision = _redirected(sharded, stored, branch=_VISION)
        text = _redirected(sharded, stored, branch=_TEXT)
        # The same stored tensor cannot be asked for twice in one load.
        parts = [
            _select(vision, lambda name: _VISION in name),
            _select(text, lambda name: _VISION not in name),
        ]
    else:
        parts = [sharded]
    for part in parts:
        _refuse_missing(part, stored, folder)
    loaded: dict[str, dict[str, torch.Tensor]] = {key: {} for key in sharded}
    for part in parts:
        if not _any_process_needs(part):
            continue
        result = _load(part, folder)  # a run's checkpoint also returns its schedule, step, ...
        for key, tensors in loaded.items():
            tensors.update(result[key])
    load_chunks(chunks, loaded)


def load_chunks(chunks: Sequence[EveModel], loaded: Mapping[str, Any]) -> None:
    """Put the tensors that a load of `sharded_weights` returned into the chunks."""
    for index, chunk in enumerate(chunks):
        tensors = loaded[chunk_key(index, len(chunks))]
        chunk.load_state_dict(_with_extra_state(chunk, tensors), strict=True)


def _load(part: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(
            part, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(f"cannot load {folder} into this model: {error}") from error


def _any_process_needs(part: dict[str, Any]) -> bool:
    flag = torch.tensor([int(any(part.values()))], device=torch.cuda.current_device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _with_extra_state(chunk: EveModel, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    # Transformer Engine's and megatron-core's linears expect the key even where there is no state.
    missing = [key for key in chunk.state_dict() if key.endswith("_extra_state")]
    return {**tensors, **dict.fromkeys(missing)}


def _select(sharded: dict[str, Any], keep: Any) -> dict[str, Any]:
    return {
        key: {name: value for name, value in chunk.items() if keep(name)}
        for key, chunk in sharded.items()
    }


def _redirected(sharded: dict[str, Any], stored: set[str], *, branch: str) -> dict[str, Any]:
    """Point each tensor of `branch` whose key is not stored to the unsplit key, where that one is stored."""
    for chunk in sharded.values():
        for value in chunk.values():
            unsplit = value.key.replace(branch, ".")
            if branch in value.key and value.key not in stored and unsplit in stored:
                value.key = unsplit
    return sharded


def _refuse_missing(part: dict[str, Any], stored: set[str], folder: str | Path) -> None:
    wanted = {value.key for chunk in part.values() for value in chunk.values()}
    missing = sorted(wanted - stored)
    if missing:
        shown = ", ".join(missing[:4]) + (
            f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        )
        raise CheckpointError(
            f"{folder} lacks {shown}; for a dense checkpoint set checkpoint.copy_text_to_vision=true, "
            "otherwise model.split or the checkpoint is the wrong one"
        )
