# SPDX-License-Identifier: Apache-2.0
"""What follows from a configuration by arithmetic alone: parameter counts, the largest image, steps, memory of weights.

Pure functions, no torch. Sources: EVEv2 train.py:349-363 for the resize rule behind the largest image; the parameter
counts equal those of the official 7B checkpoint (15,478,272 + 6,525,618,176 + 7,615,616,512)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_eve.config.decoder import Linear, Norm, decoder_layer, patch_convolutions
from megatron_eve.config.schema import ModelConfig, RunConfig, TrainableGroup

BYTES_PER_VALUE = {"bf16": 2, "fp32": 4}
_FP32 = 4


def parameter_counts(model: ModelConfig) -> dict[TrainableGroup, int]:
    """Parameters of the whole model by trainable group; the embedding counts without padding rows."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    rows = decoder_layer(model).rows
    return {
        "patch_embedding": _patch_embedding_parameters(model),
        "vision": model.num_layers * _on_rank([row for row in rows if row.is_split(model.split)]),
        "text": model.num_layers * _on_rank(rows) + embeddings + model.hidden_size,
    }


def _on_rank(rows: Iterable[Norm | Linear], *, tensor: int = 1) -> int:
    """Parameters on one of `tensor` ranks, which share linears and replicate norms."""
    rows = list(rows)
    norms = sum(row.parameters for row in rows if isinstance(row, Norm))
    return norms + sum(row.parameters for row in rows if isinstance(row, Linear)) // tensor


def _patch_embedding_parameters(model: ModelConfig) -> int:
    convolutions = sum(one.parameters for one in patch_convolutions(model))
    return convolutions + 2 * model.hidden_size  # CLS and SPL


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank of the fullest pipeline stage. Activations, buffers and fragmentation are not in it."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def memory_estimate(config: RunConfig) -> MemoryEstimate:
    """Weights (all), fp32 gradients and Adam state (trained groups only) of one rank of the fullest pipeline stage."""
    held = _parameters_on_fullest_stage(config)
    trained = sum(held[group] for group in config.stage.trainable)
    # Adam keeps two fp32 moments, and under bf16 an fp32 copy of the weights.
    optimizer_bytes = trained * _FP32 * (3 if config.train.dtype == "bf16" else 2)
    parallel = config.parallel
    # megatron-core spreads the optimizer over data- and context-parallel ranks together
    shards = parallel.data * parallel.context if parallel.distributed_optimizer else 1
    return MemoryEstimate(
        weights=sum(held.values()) * BYTES_PER_VALUE[config.train.dtype],
        gradients=trained * _FP32,
        optimizer=-(-optimizer_bytes // shards),
    )


def _parameters_on_fullest_stage(config: RunConfig) -> dict[TrainableGroup, int]:
    """Tensor parallelism divides linears and embeddings, and replicates norms and the patch embedding."""
    model, tensor, pipeline = config.model, config.parallel.tensor, config.parallel.pipeline
    rows, layers = decoder_layer(model).rows, model.num_layers // pipeline
    split = [row for row in rows if row.is_split(model.split)]
    table = padded_vocab_size(model, tensor=tensor) // tensor * model.hidden_size
    ends = table if pipeline > 1 or model.tie_word_embeddings else 2 * table
    return {
        "patch_embedding": _patch_embedding_parameters(model),
        "vision": layers * _on_rank(split, tensor=tensor),
        "text": layers * _on_rank(rows, tensor=tensor) + ends + model.hidden_size,
    }


def padded_vocab_size(model: ModelConfig, *, tensor: int) -> int:
    """Rows of the token embedding once padded to a multiple of the tensor-parallel size."""
    return -(-model.vocab_size // tensor) * tensor


def largest_image_tokens(*, image_edge: int, max_aspect_ratio: float, pixels_per_token: int) -> int:
    """Tokens of the largest image that the train-time resize can give: patches, one SPL a row, one CLS.

    The rule scales an image to at most image_edge^2 pixels, keeps its aspect ratio, then rounds each edge to the
    nearest multiple. For each number of rows this takes the height (within the rounding interval) that allows the
    widest image; both rounding ties count upwards, so the result is an upper bound that is reached up to
    the granularity of pixels.
    """
    area = float(image_edge) ** 2
    tallest = math.sqrt(area * max_aspect_ratio)
    best_height = math.sqrt(area / max_aspect_ratio)  # where the area cap meets the aspect limit
    largest = 0
    for rows in range(1, max(1, math.floor(tallest / pixels_per_token + 0.5)) + 1):
        lowest = (rows - 0.5) * pixels_per_token if rows > 1 else 1.0
        height = min(max(best_height, lowest), (rows + 0.5) * pixels_per_token)
        width = min(area / height, max_aspect_ratio * height)
        columns = max(1, math.floor(width / pixels_per_token + 0.5))
        largest = max(largest, rows * columns + rows + 1)
    return largest


def largest_sample_tokens(config: RunConfig) -> int:
    """Pack tokens that a sample with one image of the largest size and the longest text takes: the sample padded to
    `sample_align` with text, then both segments aligned."""
    align = config.data.align
    image = largest_image_tokens(
        image_edge=config.data.image_edge,
        max_aspect_ratio=config.data.max_aspect_ratio,
        pixels_per_token=config.model.pixels_per_token,
    )
    text = config.data.max_text_tokens + config.data.sample_align - 1
    return -(-image // align) * align + -(-text // align) * align


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochSize:
    """The size of all sources together, known once the shards are read."""

    samples: int  # fit for training
    tokens: int  # theirs, with what pads each sample


def total_steps(config: RunConfig, *, epoch: EpochSize | None) -> int | None:
    """Steps of the run: `train.steps`, or as many as let `train.epochs` epochs come.

    In samples the last global batch is filled from the next epoch; in packs their tokens are counted as if every pack
    were full, so that as much of an epoch is left as the packer leaves empty, less than 1%. None when the size of an
    epoch is needed and not known."""
    train, batch = config.train, config.batch
    if train.steps is not None or train.epochs is None:
        return train.steps
    if epoch is None:
        return None
    if batch.unit == "packs":
        return math.ceil(train.epochs * epoch.tokens / (batch.size * config.data.pack_tokens))
    return math.ceil(train.epochs * epoch.samples / batch.size)


def expected_packs(config: RunConfig, *, epoch: EpochSize) -> tuple[float, int]:
    """Packs that the samples of an average step fill, and packs that are computed: every rank has the same number."""
    ranks = config.parallel.data
    if config.batch.unit == "packs":
        return config.batch.size, config.batch.size
    filled = config.batch.size * epoch.tokens / epoch.samples / config.data.pack_tokens
    return filled, math.ceil(filled / ranks) * ranks


def warmup_steps(config: RunConfig, *, steps: int) -> int:
    """Steps of linear warm-up, rounded up as the official runs do."""
    return math.ceil(config.optim.warmup_fraction * steps)
