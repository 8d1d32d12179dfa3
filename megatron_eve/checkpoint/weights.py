# SPDX-License-Identifier: Apache-2.0
"""Model weights in megatron-core's distributed checkpoint format, written in one layout and read in any other.

A weights folder holds `config.txt` (the run or model that wrote it), the tensors, and `complete.json`, written last:
a folder without it is not a checkpoint. Keys are the parameter names of EveModel, with the decoder's layers stacked
along a leading axis.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eve.checkpoint.canonical import TensorHash, canonical_hashes
from megatron_eve.checkpoint.fit import refuse_non_finite, refuse_other_shapes
from megatron_eve.checkpoint.manifest import Manifest, check_folder
from megatron_eve.checkpoint.sharding import chunk_key, load_sharded, sharded_weights
from megatron_eve.checkpoint.verify import refuse_differences, verify_folder
from megatron_eve.config.model_lines import PREFIX, model_from_text
from megatron_eve.config.schema import ModelConfig
from megatron_eve.config.text_form import lines_of
from megatron_eve.config.weights_model import refuse_other_model
from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel
from megatron_eve.run_files import CONFIG, first_whole, newest_first

LOAD_ERRORS = (
    CheckpointingException,
    CheckpointException,
    KeyError,
    ValueError,
    AssertionError,
)
"""What a load of tensors that do not fit raises; torch's CheckpointException is a BaseException."""

_LOG = logging.getLogger(__name__)
_VISION, _TEXT = ".vision.", ".text."


def weights_folder(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest whole checkpoint if it is a run directory."""
    path = Path(path)
    found = first_whole(newest_first(path), check=check_folder, skipped=_name_broken)
    return found[0] if found else path


def _name_broken(_path: Path, error: CheckpointError) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _LOG.error("skipping a broken checkpoint: %s", error)


def read_config_text(folder: str | Path) -> str:
    """The resolved configuration of the run or model that wrote the checkpoint."""
    return (weights_folder(folder) / CONFIG).read_text()


def load_weights(
    chunks: Sequence[EveModel], folder: str | Path, *, copy_text_to_vision: bool
) -> None:
    """Load weights written in any layout into these chunks. `folder`: see weights_folder. Collective.

    With `copy_text_to_vision`, a component that is split here but not in the checkpoint gets the checkpoint's weight in
    both branches (between stages 1 and 2.1; official repeat_moe.py:160-172).

    Raises: ConfigError or CheckpointError with a line for each constant in which the folder's model is another one;
    CheckpointError if the folder is incomplete, lacks tensors, or holds values that are not finite.
    """
    folder, manifest = _verified(Path(folder))
    metadata = dist_checkpointing.load_tensors_metadata(str(folder))
    stored = set(metadata)
    _refuse_other_model(chunks[0].model_config, folder, copy_text_to_vision=copy_text_to_vision)
    shapes = {name: tuple(tensor.global_shape) for name, tensor in metadata.items()}
    refuse_other_shapes(chunks[0].model_config, shapes, folder=folder)
    sharded = sharded_weights(chunks)
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
        # a run's checkpoint also returns its schedule, step, ...
        result = _load(part, folder, chunks[0].pg_collection.dp_cp)
        for key, tensors in loaded.items():
            tensors.update(result[key])
    load_chunks(chunks, loaded)
    _refuse_other_weights(canonical_hashes(chunks), manifest, folder=folder)
    refuse_non_finite(chunks, source=folder)


def _refuse_other_model(model: ModelConfig, folder: Path, *, copy_text_to_vision: bool) -> None:
    """Compare the folder that is loaded once more; weights that a test saves may have no model."""
    text = (folder / CONFIG).read_text()
    if any(key.startswith(PREFIX) for key in lines_of(text)):
        stored = model_from_text(text, where=str(folder / CONFIG))
        refuse_other_model(model, stored, weights=folder, copy_text_to_vision=copy_text_to_vision)


def _refuse_other_weights(
    live: Mapping[str, TensorHash], manifest: Manifest, *, folder: Path
) -> None:
    """Copies in both branches are compared under the unsplit name. Not compared: a model of another precision, which
    has other bits, and a folder from before there were hashes."""
    expected = {}
    for name, tensor in live.items():
        for stored_name in (name, name.replace(_VISION, "."), name.replace(_TEXT, ".")):
            stored = manifest.tensors.get(stored_name)
            if stored is not None and stored.dtype == tensor.dtype:
                expected[name] = stored
                break
    refuse_differences({name: live[name] for name in expected}, expected, folder=folder)


def _verified(path: Path) -> tuple[Path, Manifest]:
    """The folder that `path` means (see weights_folder), every byte checked. Collective."""
    box = [newest_first(path) or [path]]
    torch.distributed.broadcast_object_list(box, src=0)  # all ranks must try the same
    *newer, oldest = box[0]
    found = first_whole(newer, check=verify_folder, skipped=_name_broken)
    return found or (oldest, verify_folder(oldest))


def load_chunks(chunks: Sequence[EveModel], loaded: Mapping[str, Any]) -> None:
    """Put the tensors that a load of `sharded_weights` returned into the chunks."""
    for index, chunk in enumerate(chunks):
        tensors = loaded[chunk_key(index, len(chunks))]
        chunk.load_state_dict(_with_extra_state(chunk, tensors), strict=True)


def _load(part: dict[str, Any], folder: str | Path, group: ProcessGroup) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = load_sharded(part, folder, group)
        return loaded
    except LOAD_ERRORS as error:
        raise CheckpointError(f"cannot load {folder} into this model: {reason_of(error)}") from None


def reason_of(error: BaseException) -> str:
    """One line. torch's CheckpointException prints a traceback for each rank; the first rank's error is enough."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason_of(cause)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


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
    """Point each tensor of `branch` whose key is not stored to the unsplit key, if that is stored."""
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
