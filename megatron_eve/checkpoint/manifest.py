# SPDX-License-Identifier: Apache-2.0
"""complete.json: what a checkpoint folder holds, written last. Without it, or unlike it, a folder is no checkpoint.

    format, kind ("training" or "weights"), step, stage, layout, data   what the run knew
    tensors    canonical tensors by name: hash, shape, dtype (canonical.py); the same for every layout
    files      every other file by name: bytes and XXH3-128
    seal       XXH3-128 of all the above, so that a flipped bit in this file is noticed too

Folders written before there were hashes have sizes only (`files` by name: bytes), so only these are checked.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_eve.checkpoint.canonical import TensorHash
from megatron_eve.errors import CheckpointError
from megatron_eve.run_files import COMPLETE
from megatron_eve.whole import write_text

FORMAT = 2  # 1: sizes only
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file; `hash` is None in folders of format 1."""

    bytes: int
    hash: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A read complete.json."""

    facts: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorHash] = field(default_factory=dict)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write complete.json. Raises: OSError."""
    content = {
        "format": FORMAT,
        **manifest.facts,
        "tensors": {name: tensor.as_json() for name, tensor in manifest.tensors.items()},
        "files": {n: {"bytes": f.bytes, "xxh3_128": f.hash} for n, f in manifest.files.items()},
    }
    content["seal"] = _seal(content)
    write_text(folder / COMPLETE, json.dumps(content, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Raises: CheckpointError if there is no folder or no complete.json, or if that was damaged."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    try:
        content = json.loads((folder / COMPLETE).read_text())
        files = {name: _file_entry(entry) for name, entry in content.pop("files").items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint ({COMPLETE}: {error}); it was interrupted while being "
            "written or is not ours; use another checkpoint"
        ) from error
    tensors = content.pop("tensors", {})
    seal = content.pop("seal", None)
    if "format" in content or seal is not None:
        listed = {n: {"bytes": f.bytes, "xxh3_128": f.hash} for n, f in files.items()}
        if seal != _seal({**content, "tensors": tensors, "files": listed}):
            raise CheckpointError(
                f"{folder / COMPLETE} was changed after it was written; use another checkpoint"
            )
    hashes = {name: TensorHash.from_json(entry) for name, entry in tensors.items()}
    return Manifest(facts=content, files=files, tensors=hashes)


def _file_entry(entry: Any) -> FileEntry:
    if isinstance(entry, int):
        return FileEntry(entry, None)
    return FileEntry(entry["bytes"], entry["xxh3_128"])


def _seal(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def check_folder(folder: str | Path) -> dict[str, Any]:
    """The facts of a complete checkpoint folder whose files are all there, with the right sizes. Opens none of them.

    Raises: CheckpointError that says what is missing: the folder, complete.json, a file, or bytes of a file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != entry.bytes:
            raise CheckpointError(
                f"{path}: found {found} bytes, {COMPLETE} says {entry.bytes}; use another checkpoint"
            )
    return dict(manifest.facts)


def check_bytes(folder: Path, names: Iterable[str], manifest: Manifest) -> None:
    """Read these files. Raises: CheckpointError naming the first that is damaged or not listed."""
    for name in names:
        if name not in manifest.files:
            raise CheckpointError(
                f"{folder / COMPLETE} does not list {name}; use another checkpoint"
            )
        expected = manifest.files[name].hash
        try:
            found = hash_file(folder / name) if expected is not None else None
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / name}: {error}") from error
        if found != expected:
            raise CheckpointError(
                f"{folder / name}: its bytes are not those that were written (XXH3-128 {found}, {COMPLETE} says "
                f"{expected}); use another checkpoint"
            )


def hash_file(path: Path) -> str:
    """XXH3-128. Raises: OSError."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> FileEntry:
    """The entry of a file as it is now. Raises: OSError."""
    return FileEntry(path.stat().st_size, hash_file(path))
