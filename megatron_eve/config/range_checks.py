# SPDX-License-Identifier: Apache-2.0
"""Checks of single fields: each number must be in its meaningful range.

One message per field out of range. Optional fields are checked if they are set."""

from collections.abc import Iterable, Iterator
from operator import attrgetter

from megatron_eve.config.schema import RunConfig

_AT_LEAST_ONE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.max_position_embeddings",
    "model.patch_stride",
    "model.dense_stride",
    "model.patch_embed_dim",
    "data.image_edge",
    "data.max_text_tokens",
    "data.pack_tokens",
    "data.align",
    "data.sample_align",
    "data.open_bins",
    "data.shuffle_block_size",
    "data.prefetch_steps",
    "parallel.num_nodes",
    "parallel.gpus_per_node",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "batch.size",
    "optim.loss_group_samples",
    "train.steps",
    "train.distributed_timeout_s",
    "checkpoint.save_every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every_steps",
    "logging.every_steps",
    "gpu.fp8_min_width",
    "profile.first_step",
    "evaluation.every_steps",
    "evaluation.timeout_s",
)
_ABOVE_ZERO = (
    "model.rms_norm_eps",
    "model.rope_theta",
    "model.init_std",
    "train.epochs",
    "optim.peak_lr",
    "optim.patch_embedding_lr",
    "optim.adam_eps",
    "optim.clip_grad",
)
_NOT_NEGATIVE = (
    "data.num_workers",
    "data.seed",
    "train.seed",
    "optim.min_lr",
    "optim.weight_decay",
    "gpu.bf16_first_layers",
    "gpu.bf16_last_layers",
)
_BELOW_ONE = (
    "data.max_unreadable",
    "optim.warmup_fraction",
    "optim.adam_beta1",
    "optim.adam_beta2",
)
_NOT_EMPTY = (
    "recipe",
    "run_dir",
    "data.tokenizer",
    "checkpoint.load_weights_from",
    "logging.wandb_project",
    "evaluation.command",
)


def range_problems(config: RunConfig) -> Iterator[str]:
    """One message per field that is out of range by itself."""
    for key, value in _set_fields(config, _AT_LEAST_ONE):
        if not value >= 1:
            yield f"{key}={value} is below 1; use 1 or more."
    for key, value in _set_fields(config, _ABOVE_ZERO):
        if not value > 0:
            yield f"{key}={value} is not positive; use a number above 0{_hint(key)}."
    for key, value in _set_fields(config, _NOT_NEGATIVE):
        if not value >= 0:
            yield f"{key}={value} is negative; use 0 or more."
    for key, value in _set_fields(config, _BELOW_ONE):
        if not 0 <= value < 1:
            yield f"{key}={value} is not a fraction; use a number from 0 to below 1."
    for key in _NOT_EMPTY:
        if attrgetter(key)(config) == "":
            yield f"{key} is empty; give it a value."
    if not config.data.max_aspect_ratio >= 1:
        yield (
            f"data.max_aspect_ratio={config.data.max_aspect_ratio} is below 1, the ratio of a square; "
            "use the longer edge over the shorter one, e.g. 10."
        )
    yield from _source_problems(config)
    yield from _profile_problems(config)


def _set_fields(config: RunConfig, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Key and value of the fields that are not None."""
    for key in keys:
        value = attrgetter(key)(config)
        if value is not None:
            yield key, value


def _hint(key: str) -> str:
    return ", or none for no clipping" if key == "optim.clip_grad" else ""


def _profile_problems(config: RunConfig) -> Iterator[str]:
    profile, world_size = config.profile, config.parallel.world_size
    if profile.last_step < profile.first_step:
        yield (
            f"profile.last_step={profile.last_step} is before profile.first_step={profile.first_step}; "
            "use the same number to record one step."
        )
    absent = [rank for rank in profile.ranks if not 0 <= rank < world_size]
    if absent or not profile.ranks:
        found = f"holds {absent[0]}" if absent else "is empty"
        yield f"profile.ranks {found}; name ranks from 0 to {world_size - 1}, e.g. 0."


def _source_problems(config: RunConfig) -> Iterator[str]:
    sources = config.data.sources
    if not sources:
        yield "data.sources is empty; set data.sources.0.path and data.sources.0.proportion."
    for index, source in enumerate(sources):
        key = f"data.sources.{index}"
        if source.path == "":
            yield f"{key}.path is empty; name a folder of MDS shards."
        if not source.proportion > 0:
            yield (
                f"{key}.proportion={source.proportion} is not positive; use a number above 0, "
                "or leave the source out."
            )
    paths = [source.path for source in sources]
    for path in sorted({path for path in paths if path and paths.count(path) > 1}):
        numbers = " and ".join(str(i) for i, other in enumerate(paths) if other == path)
        yield (
            f"data.sources {numbers} name the same folder {path}; keep one and give it their "
            "proportions together."
        )
