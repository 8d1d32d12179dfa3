# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder as the official EVEv2 code reads it: its fields and files, none of ours.

The official configuration names its image processor by a path, `openai/eve-anyratio-res{M}-patch{p}`, which the
official code opens relative to the working directory (EVEv2 vision_tokenizer.py:15). That folder is written inside:
start the official code there, or in its own checkout, which has it for the official sizes.
"""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_eve.config.schema import ModelConfig
from megatron_eve.errors import CheckpointError

from .automodel_layout import (
    Release,
    config_json,
    copy_tokenizer,
    fitting_tokenizer,
    write_json,
)
from .generation import GENERATION_FILE, generation_json
from .hf_config import preprocessor_json
from .hf_folder import MAX_SHARD_BYTES, write_safetensors
from .new_folder import new_folder

_OUR_FIELDS = ("auto_map", "patch_stride", "dense_stride", "head_dim", "transformers_version")
"""Of config.json: the official classes derive the head's size and read the strides from the image processor; their
transformers, 4.44.2, needs no version."""

_OUR_PROCESSOR_FIELDS = ("auto_map", "processor_class", "resize_rule", "exif_rotation")


def write_official(
    folder: Path,
    release: Release,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the folder; returns the bytes of the weights.

    Raises: CheckpointError if it exists and not `overwrite`, for a model that the official classes cannot build, or for
    a tokenizer that does not fit it.
    """
    model = release.model
    tokenizer = fitting_tokenizer(release.tokenizer, model, run=release.run)
    refuse_other_heads(model)
    config = config_json(release, tokenizer)
    processor = preprocessor_json(
        model, image_edge=release.image_edge, exif_rotation=release.exif_rotation
    )
    with new_folder(folder, overwrite=overwrite) as partial:
        total = write_safetensors(partial, tensors, max_shard_bytes=max_shard_bytes)
        processor_folder = partial / config["mm_vision_tower"]
        processor_folder.mkdir(parents=True)
        write_json(partial / "config.json", _without(config, _OUR_FIELDS))
        write_json(
            partial / GENERATION_FILE,
            generation_json(tokenizer, release.source_generation),
        )
        write_json(
            processor_folder / "preprocessor_config.json",
            _without(processor, _OUR_PROCESSOR_FIELDS),
        )
        copy_tokenizer(release.tokenizer, partial, release)
    return total


def refuse_other_heads(model: ModelConfig) -> None:
    """Raises: CheckpointError for heads that the official classes cannot build."""
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        raise CheckpointError(
            f"The official code takes hidden_size / num_attention_heads = {model.hidden_size} / "
            f"{model.num_attention_heads} for the size of a head, this model has {model.head_dim}; use "
            "--layout automodel."
        )


def _without(content: dict[str, object], names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name, value in content.items() if name not in names}
