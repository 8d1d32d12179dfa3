# SPDX-License-Identifier: Apache-2.0
"""From a released folder's safetensors files to the model, tensor by tensor, straight onto the device.

The host never holds more than the tensor that is on its way (safetensors maps the file). Refused by name, before
anything is read: a missing tensor, a surplus one, one of another shape. Refused when it is read: one with values that
are NaN or infinite.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError
from megatron_eve.finite import check_finite
from megatron_eve.inference.decoder import EveForInference

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_weights(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype | None
) -> EveForInference:
    """The model on `device`, in `dtype` (None: the dtype of the files). Raises CheckpointError."""
    with torch.device("meta"):
        model = EveForInference(config)
    files = _files(folder)
    _check(folder, files, model)
    for path, names in files.items():
        with _open(path, device) as file:
            for name in names:
                tensor = check_finite(name, file.get_tensor(name), source=path)
                _place(model, name, tensor.to(dtype or tensor.dtype))
    return model.eval().requires_grad_(False)


def _files(folder: Path) -> dict[Path, list[str]]:
    """File -> names of the tensors in it, from the files' own headers."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        file_of = read_index(index)
        paths = [folder / name for name in sorted(set(file_of.values()))]
    elif single.is_file():
        file_of, paths = None, [single]
    else:
        raise CheckpointError(f"{folder} has neither {single.name} nor {index.name}.")
    files = {}
    for path in paths:
        with _open(path) as file:
            files[path] = list(file.keys())
    if file_of is not None:
        found = {(name, path.name) for path, names in files.items() for name in names}
        if wrong := sorted(found ^ set(file_of.items())):
            name, file = wrong[0]
            raise CheckpointError(
                f"{index} and {file} disagree about {name!r}; copy the folder again."
            )
    return files


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, of a model.safetensors.index.json. Raises CheckpointError."""
    try:
        weight_map: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is no index of safetensors files ({type(error).__name__}: {error}); copy it again."
        ) from error
    if (index.parent / "model.safetensors").is_file():  # which transformers would take
        raise CheckpointError(
            f"{index.parent} holds both model.safetensors and {index.name}; remove the one that is not meant."
        )
    if outside := next((file for file in found.values() if file != Path(file).name), None):
        raise CheckpointError(f"{index} names {outside!r}, which is not in its folder.")
    return found


def _check(folder: Path, files: dict[Path, list[str]], model: nn.Module) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[int]] = {}
    dtypes = set()
    for path, names in files.items():
        with _open(path) as file:
            for name in names:
                part = file.get_slice(name)
                found[name] = list(part.get_shape())
                dtypes.add(part.get_dtype())
    hint = "config.json and the weights do not belong together; make the release again."
    for name in sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{folder} has no tensor {name!r}, which config.json asks for: {hint}"
        )
    for name in sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{folder} holds {name!r}, which config.json knows nothing of: {hint}"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {shape}, config.json asks for {wanted[name]}: {hint}"
            )
    if unknown := sorted(dtypes - _DTYPES.keys()):
        raise CheckpointError(f"{folder}: dtype {unknown[0]} is not one of {sorted(_DTYPES)}.")


def _place(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _open(path: Path, device: torch.device | None = None) -> Any:
    try:
        return safe_open(path, framework="pt", device=str(device or "cpu"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again.") from error
