# SPDX-License-Identifier: Apache-2.0
"""A distributed checkpoint -> a Hugging Face folder with the official EVE names, one tensor at a time.

Two layouts: `automodel` stands alone and is loaded by transformers' Auto classes; `official` is what the official code
reads. The tokenizer and the image area come from the run that wrote the checkpoint unless they are given. Weights keep
their bytes and their dtype.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_eve.checkpoint.manifest import read_manifest
from megatron_eve.config.schema import RunConfig
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.data.read.vocabulary import FACT, refuse_other_vocabulary
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.finite import check_finite
from megatron_eve.run_files import step_of

from .automodel_layout import Release, fitting_tokenizer, write_release
from .generation import source_generation
from .hf_folder import TensorStream
from .hf_to_megatron import described
from .megatron_folder import MegatronWeights, read_megatron, refuse_damaged
from .names import tensor_rules
from .official_layout import refuse_other_heads, write_official
from .run_record import read_history
from .tensors import HfView

_TORCH_NAMES: dict[str, Literal["bfloat16", "float32"]] = {"bf16": "bfloat16", "fp32": "float32"}
Layout = Literal["automodel", "official"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """How a distributed checkpoint is released."""

    tokenizer: Path | None  # None: the run's
    image_edge: int | None  # None: the run's
    max_shard_bytes: int
    overwrite: bool
    layout: Layout = "automodel"
    exif_rotation: bool | None = None  # None: the run's


def export_hf(source: Path, dest: Path, options: ExportOptions) -> int:
    """Convert the checkpoint folder `source` to the Hugging Face folder `dest`; returns the bytes of its weights.

    Raises: CheckpointError if the weights are not what was saved, or `dest` cannot be written."""
    weights, release = read_release_of(source, options)
    write = write_release if options.layout == "automodel" else write_official
    return write(
        dest,
        release,
        finite_tensors(weights),
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_bytes,
    )


def read_release_of(source: Path, options: ExportOptions) -> tuple[MegatronWeights, Release]:
    """The weights, every byte checked, and what a folder of them holds besides.

    Raises: CheckpointError if the weights are not what was saved."""
    weights = read_megatron(source)
    folder = weights.folder.resolve()  # not `source`: a run that goes on may have a newer one
    release = Release(
        model=weights.model,
        dtype=_TORCH_NAMES[weights.dtype],
        tokenizer=_tokenizer(weights, options),
        image_edge=_image_edge(weights.run, options),
        run=weights.run,
        origin=_origin(folder),
        history=None if weights.run is None else read_history(folder),
        exif_rotation=_exif_rotation(weights.run, options),
        source_generation=source_generation(folder),
    )
    refuse_damaged(weights)
    return weights, release


def hf_stream(weights: MegatronWeights) -> TensorStream:
    """The tensors under their Hugging Face names, each read when it is asked for.

    Raises: CheckpointError if names or shapes are not those of the checkpoint's model."""
    headers = HfView(weights.tensors.headers, weights.model, resize_vocabulary=False)
    return TensorStream(dict(headers), hf_view(weights).__getitem__)


def finite_tensors(weights: MegatronWeights) -> TensorStream:
    """hf_stream(); reading a tensor raises CheckpointError if a value is NaN or infinite."""
    stream, source = hf_stream(weights), weights.folder.resolve()
    return TensorStream(
        stream.headers, lambda name: check_finite(name, stream.read(name), source=source)
    )


def hf_view(weights: MegatronWeights) -> HfView:
    """The tensors under their Hugging Face names."""
    tensors = weights.tensors
    return HfView(tensors, weights.model, resize_vocabulary=False, read_rows=tensors.rows)


def planned_mapping(source: Path, options: ExportOptions) -> list[str]:
    """`EVEMODEL_NAME [shape] dtype -> NAME, ...` for each tensor, after the export's checks; for a dry run."""
    weights = read_megatron(source)
    fitting_tokenizer(_tokenizer(weights, options), weights.model, run=weights.run)
    _image_edge(weights.run, options)
    _exif_rotation(weights.run, options)
    if options.layout == "official":
        refuse_other_heads(weights.model)
    hf_stream(weights)
    return [
        f"{described(rule.eve, weights.tensors.headers)} -> {', '.join(rule.hf)}"
        for rule in tensor_rules(weights.model)
    ]


def _origin(folder: Path) -> str:
    """RUN/STEP of a run's checkpoint, else the folder's name; no path of this machine."""
    is_step = step_of(folder) is not None
    return f"{folder.parent.parent.name}, {folder.name}" if is_step else folder.name


def _tokenizer(weights: MegatronWeights, options: ExportOptions) -> Path:
    """The given tokenizer, or the run's. Raises: ConfigError if it is not the weights' own."""
    folder = _tokenizer_folder(weights.run, options)
    recorded = read_manifest(weights.folder).facts.get(FACT)
    backend = load_tokenizer(folder).backend
    refuse_other_vocabulary(recorded, backend, folder=folder, weights=weights.folder)
    return folder


def _tokenizer_folder(run: RunConfig | None, options: ExportOptions) -> Path:
    if options.tokenizer is not None:
        return options.tokenizer
    if run is None:
        raise ConfigError("The checkpoint names no tokenizer; give its folder with --tokenizer.")
    path = Path(run.data.tokenizer)
    if not path.is_dir():
        raise ConfigError(
            f"The run's tokenizer folder {path} is not here; give it with --tokenizer."
        )
    return path


def _image_edge(run: RunConfig | None, options: ExportOptions) -> int:
    if run is not None and options.image_edge not in (None, run.data.image_edge):
        raise ConfigError(
            f"The run was trained with data.image_edge={run.data.image_edge}, --image-edge is {options.image_edge}; a "
            "release that scales pictures to another area would be asked what it has not learned: leave it out."
        )
    if options.image_edge is not None:
        return options.image_edge
    if run is None:
        raise CheckpointError(
            "The checkpoint was not written by a run, so it does not say to which area images were scaled; give it "
            "with --image-edge (800 or 1600 in the official stages)."
        )
    return run.data.image_edge


def _exif_rotation(run: RunConfig | None, options: ExportOptions) -> bool:
    """The run's choice. For weights of no run: turned, unless the caller decides."""
    if run is None:
        return options.exif_rotation is not False
    trained = run.data.exif_rotation
    if options.exif_rotation not in (None, trained):
        raise ConfigError(
            f"The run was trained with data.exif_rotation={str(trained).lower()}; a release that reads pictures in "
            "another way would be asked what it has not learned: leave --exif-rotation and --no-exif-rotation out."
        )
    return trained
