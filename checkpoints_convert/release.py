# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint -> a release that people can use: weights, code, a card with the run's own facts, checksums.

`megatron-to-hf` converts; this adds the facts that a reader needs (run_record.py, evaluation/results.py) and
SHA256SUMS, then loads the folder as a user would, offline, and answers a prompt that is an image and nothing else.
Only a folder that passed all of it gets its name.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_eve.errors import CheckpointError
from megatron_eve.evaluation.results import read_results
from megatron_eve.run_files import step_of

from .automodel_layout import write_release
from .megatron_to_hf import ExportOptions, finite_tensors, read_release_of
from .model_card import CardAdditions

CHECKSUMS = "SHA256SUMS"
SOFTWARE = ("megatron-eve", "megatron-core", "torch", "transformers")
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseOptions:
    """How to release a run, beyond its conversion."""

    export: ExportOptions
    results: tuple[Path, ...] = ()  # of evaluations, for the card
    license: str | None = None
    check: bool = True


def release_run(source: Path, dest: Path, options: ReleaseOptions) -> int:
    """Write the released folder `dest` of the run or checkpoint `source`; returns the bytes of its weights.

    Raises: CheckpointError if `dest` exists and is not to be replaced, or if the written folder does not load;
    DataError if a results file cannot be read."""
    figures = tuple(figure for path in options.results for figure in read_results(path))
    weights, release = read_release_of(source, options.export)
    additions = CardAdditions(
        figures=figures, license=options.license, versions=tuple(_installed())
    )

    def finish(folder: Path) -> None:
        if options.check:
            check_release(folder)
        (folder / CHECKSUMS).write_text(checksums(folder), encoding="utf-8")

    return write_release(
        dest,
        dataclasses.replace(release, origin=_origin(weights.folder.resolve()), additions=additions),
        finite_tensors(weights),
        overwrite=options.export.overwrite,
        max_shard_bytes=options.export.max_shard_bytes,
        finish=finish,
    )


def _origin(checkpoint: Path) -> str:
    step = step_of(checkpoint)
    return f"{checkpoint.parent.parent.name}, step {step}" if step else checkpoint.name


def _installed() -> list[str]:
    found = []
    for name in SOFTWARE:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue  # a source tree that was not installed
    return found


def check_release(folder: Path) -> None:
    """Load the folder through the Auto classes, without network, and let it write two tokens about a grey image.

    Raises: CheckpointError with what went wrong."""
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    auto_processor: Any = AutoProcessor  # untyped upstream
    auto_model: Any = AutoModelForCausalLM
    options = {"trust_remote_code": True, "local_files_only": True}
    try:
        processor = auto_processor.from_pretrained(folder, **options)
        model, report = auto_model.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **options
        )
        inputs = processor(text="<image>", images=Image.new("RGB", (64, 48), (128, 128, 128)))
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=1).logits
            model.generate(**inputs, max_new_tokens=2)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} does not load as a release: {type(error).__name__}: {error}"
        ) from error
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(f"{folder}: its weights do not fit its code: {problems}")
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{folder}: logits of a grey image are not finite; do not release it")


def checksums(folder: Path) -> str:
    """Lines for `sha256sum --check`, of every file, sorted by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in paths)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
