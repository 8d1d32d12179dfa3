# SPDX-License-Identifier: Apache-2.0
"""The start-up plan: what a run will do, printed as arithmetic so that a reader can check every number.

One aligned line per quantity, e.g. `batch       1,024 samples a step = 32 data-parallel ranks x 32.0 on average`.
Needs nothing but a resolved configuration and, for a run counted in epochs, what an epoch holds."""

from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import (
    EpochSize,
    expected_packs,
    largest_image_tokens,
    largest_sample_tokens,
    memory_estimate,
    padded_vocab_size,
    parameter_counts,
    total_steps,
    warmup_steps,
)

_GIB = 1 << 30
_FILLED = 0.95  # of the computed packs; a lower fill gets advice


def plan_text(config: RunConfig, *, epoch: EpochSize | None) -> str:
    """The plan, one line per quantity. `epoch`: None while the shards are not read."""
    lines = [
        ("run", f"{config.recipe} in {config.run_dir}"),
        ("stage", f"{config.stage.name}, trains {', '.join(config.stage.trainable)}"),
        ("weights", _weights(config)),
        *_layout(config),
        *_batch(config, epoch=epoch),
        ("loss", _loss(config)),
        ("steps", _steps(config, epoch=epoch)),
        ("schedule", _schedule(config, epoch=epoch)),
        *_parameters(config),
        ("memory", _memory(config)),
        ("checkpoint", _checkpoints(config)),
    ]  # fmt: skip
    return "".join(f"{name:<12}{text}\n" for name, text in lines)


def _checkpoints(config: RunConfig) -> str:
    checkpoint = config.checkpoint
    every = checkpoint.keep_every_steps
    kept = f"the last {checkpoint.keep_last}" + (f" and every {every:,}th step's" if every else "")
    how = "while training goes on" if checkpoint.async_save else "while training waits"
    return f"every {checkpoint.save_every_steps:,} steps, {how}, {kept} kept"


def _weights(config: RunConfig) -> str:
    start = config.checkpoint.load_weights_from
    if start is None:
        return "random"
    copied = (
        ", vision branch copied from the text branch"
        if config.checkpoint.copy_text_to_vision
        else ""
    )
    return f"from {start}{copied}"


def _layout(config: RunConfig) -> list[tuple[str, str]]:
    parallel, model = config.parallel, config.model
    sequence = "with" if parallel.sequence_parallel else "without"
    chunks = parallel.pipeline * parallel.virtual_pipeline
    padded = padded_vocab_size(model, tensor=parallel.tensor)
    return [
        ("processes", f"{parallel.world_size} = {parallel.num_nodes} nodes x {parallel.gpus_per_node}"),
        ("layout", f"{parallel.world_size} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
                   f"{parallel.context} x data {parallel.data}, {sequence} sequence parallelism"),
        ("layers", f"{model.num_layers} = pipeline {parallel.pipeline} x virtual {parallel.virtual_pipeline} x "
                   f"{model.num_layers // chunks}"),
        ("vocabulary", f"{padded:,} = {model.vocab_size:,} + {padded - model.vocab_size} padding rows"),
    ]  # fmt: skip


def _batch(config: RunConfig, *, epoch: EpochSize | None) -> list[tuple[str, str]]:
    data, batch, ranks = config.data, config.batch, config.parallel.data
    image = largest_image_tokens(
        image_edge=data.image_edge,
        max_aspect_ratio=data.max_aspect_ratio,
        pixels_per_token=config.model.pixels_per_token,
    )
    if batch.unit == "samples":
        size = f"{batch.size:,} samples a step = {ranks} data-parallel ranks x {batch.size / ranks:,.1f} on average"
        size += "" if epoch is None else _fill_of_samples(config, epoch=epoch)
    else:
        size = (f"{batch.size:,} packs a step = {ranks} data-parallel ranks x {batch.size // ranks:,}; "
                f"{batch.size * data.pack_tokens:,} tokens = {batch.size:,} x {data.pack_tokens:,}")  # fmt: skip
    return [
        ("batch", size),
        ("pack", f"{data.pack_tokens:,} tokens = {data.pack_tokens // data.align:,} x {data.align} (align)"),
        ("image", f"at most {image:,} tokens: {data.image_edge:,}^2 pixels, aspect ratio up to "
                  f"{data.max_aspect_ratio:g}"),
        ("sample", f"at most {largest_sample_tokens(config):,} of {data.pack_tokens:,} pack tokens with one image and "
                   f"{data.max_text_tokens:,} text tokens"),
    ]  # fmt: skip


def rounding_advice(config: RunConfig, *, epoch: EpochSize) -> str | None:
    """What to change when a step of samples leaves many packs empty because every rank takes the same number."""
    filled, computed = expected_packs(config, epoch=epoch)
    if filled >= _FILLED * computed:
        return None
    ranks = config.parallel.data
    packs = max(1, round(filled / ranks)) * ranks
    samples = packs * config.data.pack_tokens * epoch.samples / epoch.tokens
    return (
        f"batch.unit=samples: {config.batch.size:,} samples fill {filled:,.1f} packs, and {computed:,} are computed "
        f"because each of {ranks} ranks has as many; batch.unit=packs batch.size={packs} takes {samples:,.0f} "
        "samples a step on average and fills them all"
    )


def _fill_of_samples(config: RunConfig, *, epoch: EpochSize) -> str:
    filled, computed = expected_packs(config, epoch=epoch)
    return f"; they fill {filled:,.1f} of {computed:,} packs: {filled / computed:.1%}"


def _steps(config: RunConfig, *, epoch: EpochSize | None) -> str:
    train, batch = config.train, config.batch
    steps = total_steps(config, epoch=epoch)
    of_packs = batch.unit == "packs"
    a_step = f"({batch.size:,} x {config.data.pack_tokens:,})" if of_packs else f"{batch.size:,}"
    what = "tokens" if of_packs else "samples"
    if steps is None:
        return f"ceil({train.epochs:g} epochs x {what} / {a_step}), known once the shards are read"
    if train.steps is not None or epoch is None:
        return f"{steps:,}"
    count = epoch.tokens if of_packs else epoch.samples
    return f"{steps:,} = ceil({train.epochs:g} epochs x {count:,} {what} / {a_step})"


def _schedule(config: RunConfig, *, epoch: EpochSize | None) -> str:
    optim, steps = config.optim, total_steps(config, epoch=epoch)
    warmup = f"{optim.warmup_fraction:g} of the steps"
    if steps is not None:
        warmup = f"{warmup_steps(config, steps=steps):,} steps = ceil({optim.warmup_fraction:g} x {steps:,})"
    patch = (
        ""
        if optim.patch_embedding_lr == optim.peak_lr
        else f" (patch embedding {optim.patch_embedding_lr:g})"
    )
    clip = "no clipping" if optim.clip_grad is None else f"clipping at norm {optim.clip_grad:g}"
    return f"warm-up {warmup} to {optim.peak_lr:g}{patch}, cosine to {optim.min_lr:g}, {clip}"


def _loss(config: RunConfig) -> str:
    how = config.optim.loss_normalization
    meaning = {
        "global_tokens": "mean over all label tokens of a step",
        "sample_mean": "mean over the samples of a step of each one's token mean",
        "sqrt_tokens": "a sample's label tokens weigh 1 / sqrt of their number",
        "official": f"mean over groups of {config.optim.loss_group_samples} samples in data order of each one's "
        "token mean",
    }
    return f"{how}: {meaning[how]}"


def _parameters(config: RunConfig) -> list[tuple[str, str]]:
    counts = parameter_counts(config.model)
    trained = sum(counts[group] for group in config.stage.trainable)
    groups = " + ".join(f"{group} {count:,}" for group, count in counts.items())
    return [
        ("parameters", f"{sum(counts.values()):,} = {groups}"),
        (
            "trained",
            f"{trained:,} = {' + '.join(f'{counts[group]:,}' for group in config.stage.trainable)}",
        ),
    ]


def _memory(config: RunConfig) -> str:
    estimate = memory_estimate(config)
    return (
        f"estimate per rank, activations not counted: {estimate.total / _GIB:.2f} GiB = weights "
        f"{estimate.weights / _GIB:.2f} + gradients {estimate.gradients / _GIB:.2f} + optimizer "
        f"{estimate.optimizer / _GIB:.2f}"
    )
