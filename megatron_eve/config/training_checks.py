# SPDX-License-Identifier: Apache-2.0
"""Checks of what a run trains, on what data, for how long. Every field is in its own range already.

Which groups a stage may train follows Table 5 of the EVEv2 paper; a dense model (EVEv1.0 of the paper's comparison)
trains its decoder where the split one trains the vision branch."""

import shlex
from collections.abc import Iterator
from pathlib import PurePath
from string import Formatter

from megatron_eve.config.gpu_checks import gpu_problems
from megatron_eve.config.schema import RunConfig, TrainableGroup
from megatron_eve.config.sizes import largest_sample_tokens

EVALUATION_MARKS = {"checkpoint", "out", "step"}
"""Placeholders that training/evaluation.py fills in evaluation.command."""

_FP8_ROWS = 16
"""Rows of a matrix that Transformer Engine's FP8 kernels need in multiples."""


def training_problems(config: RunConfig) -> Iterator[str]:
    """One message per contradiction between stage, data, batch, schedule and checkpoint."""
    yield from _stage_problems(config)
    yield from _pack_problems(config)
    yield from _length_problems(config)
    yield from _schedule_problems(config)
    yield from _loss_problems(config)
    yield from _numerics_problems(config)
    yield from gpu_problems(config)
    yield from _checkpoint_problems(config)
    yield from _evaluation_problems(config)


def _stage_problems(config: RunConfig) -> Iterator[str]:
    stage, has_vision = config.stage, config.model.split.any
    trainable = ",".join(stage.trainable)
    allowed = _trainable_groups(config)
    if not stage.trainable:
        yield f"stage.trainable is empty; stage {stage.name} can train {','.join(allowed)}."
    if len(set(stage.trainable)) != len(stage.trainable):
        yield f"stage.trainable={trainable} names a group twice; name each once."
    if "vision" in stage.trainable and not has_vision:
        yield (
            f"stage.trainable={trainable} holds vision, but model.split has no component, so the "
            f"decoder is dense and has no vision branch; set stage.trainable={','.join(allowed)} or "
            "model.split=eve-v2.0."
        )
        return
    refused = [group for group in stage.trainable if group not in allowed]
    if refused:
        yield (
            f"stage.trainable={trainable} trains {refused[0]}, which stage.name={stage.name} keeps "
            f"frozen; use {','.join(allowed)}, or another stage.name."
        )


def _trainable_groups(config: RunConfig) -> tuple[TrainableGroup, ...]:
    """The groups that a stage may train with this model."""
    has_vision = config.model.split.any
    match config.stage.name:
        case "text":
            return ("text",)
        case "1":
            return ("patch_embedding",)
        case "2.1":
            return ("patch_embedding", "vision") if has_vision else ("patch_embedding", "text")
        case "2.2" | "3":
            return (
                ("patch_embedding", "vision", "text") if has_vision else ("patch_embedding", "text")
            )


def _pack_problems(config: RunConfig) -> Iterator[str]:
    data, model = config.data, config.model
    edge = model.pixels_per_token
    if data.image_edge < edge:
        yield f"data.image_edge={data.image_edge} is below one token's {edge} pixels; use {edge} or more."
    yield from _align_problems(config)
    if data.pack_tokens % data.align or data.pack_tokens < 2 * data.align:
        least = max(2, -(-data.pack_tokens // data.align)) * data.align
        yield (
            f"data.pack_tokens={data.pack_tokens} is not a multiple of data.align={data.align} of at "
            f"least two blocks (one of vision, one of text); use {least}, for example."
        )
    elif (largest := largest_sample_tokens(config)) > data.pack_tokens:
        yield (
            f"data.pack_tokens={data.pack_tokens} is too small for one sample: the largest image at "
            f"data.image_edge={data.image_edge} and data.max_aspect_ratio={data.max_aspect_ratio:g} "
            f"with data.max_text_tokens={data.max_text_tokens} takes {largest}, segments aligned to "
            f"{data.align}; use data.pack_tokens={largest} or more, or shorter text."
        )
    if data.pack_tokens > model.max_position_embeddings:
        yield (
            f"data.pack_tokens={data.pack_tokens} is above model.max_position_embeddings="
            f"{model.max_position_embeddings}, and one sample of several images may fill a pack; use "
            "at most as many tokens."
        )


def _align_problems(config: RunConfig) -> Iterator[str]:
    align, parallel = config.data.align, config.parallel
    ranks = parallel.tensor if parallel.sequence_parallel else 1
    if align % (tensor := parallel.tensor):
        yield (
            f"data.align={align} is not a multiple of parallel.tensor={tensor}; each segment of a pack "
            f"is cut over the tensor ranks, so use {-(-align // tensor) * tensor}, for example."
        )
    elif config.train.backend == "te" and align % (_FP8_ROWS * ranks):
        block = _FP8_ROWS * ranks
        yield (
            f"data.align={align} is not a multiple of {block} = {_FP8_ROWS} rows x {ranks} ranks that "
            f"train.backend=te needs; use {-(-align // block) * block}, or 128 as the 7B recipes do."
        )


def _length_problems(config: RunConfig) -> Iterator[str]:
    train = config.train
    if (train.steps is None) == (train.epochs is None):
        yield (
            f"train.steps={_text(train.steps)} and train.epochs={_text(train.epochs)}: exactly one of "
            "the two must be set; set the other to none."
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    for key, value in (
        ("optim.peak_lr", optim.peak_lr),
        ("optim.patch_embedding_lr", optim.patch_embedding_lr),
    ):
        if optim.min_lr > value:
            yield (
                f"optim.min_lr={optim.min_lr:g} is above {key}={value:g}, so the cosine would rise; "
                "use a smaller optim.min_lr."
            )


def _loss_problems(config: RunConfig) -> Iterator[str]:
    how, group, batch = (
        config.optim.loss_normalization,
        config.optim.loss_group_samples,
        config.batch,
    )
    if how == "microbatch_mean":
        yield (
            "optim.loss_normalization=microbatch_mean is not offered any more: it was the mean over packs, so that a "
            "sample's weight depended on its neighbours. Use official with optim.loss_group_samples, the samples of a "
            "micro-batch of the official script (8, 4, 2, 2, 2 from stage 1 to stage 3), or global_tokens, sample_mean "
            "or sqrt_tokens."
        )
    elif how == "official" and group is None:
        yield (
            "optim.loss_normalization=official needs optim.loss_group_samples, found none; set it to the samples of a "
            "micro-batch of the official script (8, 4, 2, 2, 2 from stage 1 to stage 3)."
        )
    elif how != "official" and group is not None:
        yield (
            f"optim.loss_group_samples={group} belongs to optim.loss_normalization=official, found {how}; set it to "
            "none, or use official."
        )
    elif group is not None and batch.unit == "samples" and batch.size % group:
        yield (
            f"batch.size={batch.size} samples is not a multiple of optim.loss_group_samples={group}; the last group of "
            f"each step would be smaller and its samples weigh more, so use {-(-batch.size // group) * group}, for "
            "example."
        )


def _numerics_problems(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.backend == "te" and train.dtype != "bf16":
        yield (
            f"train.dtype={train.dtype} needs train.backend=local, found te: Transformer Engine's "
            "attention over packed samples has no fp32 kernel; use train.dtype=bf16 or "
            "train.backend=local."
        )


def _checkpoint_problems(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    start = checkpoint.load_weights_from
    if checkpoint.copy_text_to_vision and not config.model.split.any:
        yield (
            "checkpoint.copy_text_to_vision=true, but model.split has no component and so no vision "
            "branch to copy to; set it to false or choose a split."
        )
    if checkpoint.copy_text_to_vision and start is None:
        yield (
            "checkpoint.copy_text_to_vision=true needs checkpoint.load_weights_from, found none; name "
            "a checkpoint or set it to false."
        )
    if start is not None and PurePath(start).is_relative_to(PurePath(config.run_dir)):
        yield (
            f"checkpoint.load_weights_from={start} lies in this run's run_dir={config.run_dir}, from "
            "which it resumes by itself; name another run's checkpoint or another run_dir."
        )
    every, save = checkpoint.keep_every_steps, checkpoint.save_every_steps
    if every is not None and every % save:
        yield (
            f"checkpoint.keep_every_steps={every} is not a multiple of checkpoint.save_every_steps={save}; only saved "
            f"steps can be kept, so use {-(-every // save) * save}, for example."
        )


def _evaluation_problems(config: RunConfig) -> Iterator[str]:
    evaluation, save = config.evaluation, config.checkpoint.save_every_steps
    if evaluation.command is None:
        return
    if evaluation.every_steps is not None and evaluation.every_steps % save:
        yield (
            f"evaluation.every_steps={evaluation.every_steps} is not a multiple of checkpoint.save_every_steps={save}; "
            "only saved steps can be evaluated."
        )
    try:
        words = shlex.split(evaluation.command)
        marks = {
            mark for word in words for _, mark, _, _ in Formatter().parse(word) if mark is not None
        }
    except ValueError as error:
        yield f"evaluation.command={evaluation.command} cannot be read ({error}); check quotes and braces."
        return
    if unknown := sorted(marks - EVALUATION_MARKS):
        yield (
            f"evaluation.command holds {{{unknown[0]}}}; it can hold "
            f"{', '.join(f'{{{mark}}}' for mark in sorted(EVALUATION_MARKS))}."
        )
    if missing := sorted({"checkpoint", "out"} - marks):
        yield (
            f"evaluation.command={evaluation.command} has no {{{missing[0]}}}; without it the command does not know "
            "what to evaluate or where to write metrics.json."
        )


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
