# SPDX-License-Identifier: Apache-2.0
"""The official code's own numbers (tests/golden/official, see its README.md), and our model run on the same weights
and samples inside gloo workers."""

import contextlib
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_convert.hf_config import read_hf_config
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainableGroup
from megatron_eve.data.assemble import ExpandedSample, PackMember, assemble_pack, expand
from megatron_eve.data.plan.packing import Item, PackShape, pack_batch
from megatron_eve.data.read.conversation import EncodedSample
from megatron_eve.data.read.patches import patchify
from megatron_eve.data.sample import Pack
from tests.support.tiny import RawSample
from tests.support.train_once import EVERYTHING, build, build_all, run_config

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
CASES = ("v2.0", "v2.0-tied", "v1.5", "attention-only", "norm-only", "dense")
STEPS, MICRO_BATCHES_PER_STEP = 20, 2
PEAK_LR, PATCH_EMBEDDING_LR, WARMUP_FRACTION = 1e-3, 5e-4, 0.03
TOKENS, ALIGN = 96, 8  # of a pack; the longest micro-batch has 63 tokens
LARGEST_MICRO_BATCH = 4  # samples; a smaller one leaves places of its group empty


@dataclass(frozen=True, slots=True)
class OfficialBatch:
    """What the official code computed on micro-batch 0; gradients by their official names."""

    logits: Tensor  # [L, V] at the rows that predict a label, sample after sample
    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class OfficialSteps:
    """What 20 steps of the official trainer did; the trained parameters by their official names."""

    micro_batch_losses: Tensor  # [20, 2]
    grad_norms: Tensor  # [20] float64, before each update
    learning_rates: Tensor  # [20, 2] float64: decoder, patch embedding
    final: dict[str, Tensor]


@cache
def official_batch(case: str) -> OfficialBatch:
    """The golden forward and backward of a case of CASES."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return OfficialBatch(
        logits=tensors["logits"], loss=tensors["loss"].item(), gradients=_under(tensors, "grad.")
    )


@cache
def official_steps(name: str) -> OfficialSteps:
    """The golden steps of a case, or of "v2.0-stage2.1", where the text weights are frozen."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return OfficialSteps(
        micro_batch_losses=tensors["steps.micro_batch_loss"],
        grad_norms=tensors["steps.grad_norm"],
        learning_rates=tensors["steps.lr"],
        final=_under(tensors, "final."),
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@cache
def initial_weights(case: str) -> dict[str, Tensor]:
    """The weights that a case starts from: those of the one stored set that its model has."""
    stored = load_file(GOLDEN / "weights.safetensors")
    return {name: stored[name] for name in official_batch(case).gradients}


def write_official_folder(case: str, folder: Path) -> ModelConfig:
    """The case as the official classes save it: config.json and model.safetensors. Returns what our converter reads."""
    folder.mkdir(parents=True)
    config = json.loads((GOLDEN / "configs.json").read_text())[case]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(initial_weights(case), folder / "model.safetensors", metadata={"format": "pt"})
    return read_hf_config(folder, patch_embed_dim=0).model


@cache
def micro_batches() -> list[list[RawSample]]:
    """The five micro-batches; the optimizer steps walk over them round and round."""
    stored = load_file(GOLDEN / "samples.safetensors")
    batches: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in stored.items():
        match = re.fullmatch(r"(\d+)\.(\d+)\.(\w+)", key)
        assert match, key
        batch, sample, part = int(match[1]), int(match[2]), match[3]
        batches.setdefault(batch, {}).setdefault(sample, {})[part] = tensor
    return [
        [_raw_sample(batches[b][s]) for s in range(len(batches[b]))] for b in range(len(batches))
    ]


def _raw_sample(parts: dict[str, Tensor]) -> RawSample:
    images = [parts[name] for name in sorted(parts) if name.startswith("image")]
    return RawSample(ids=parts["ids"], images=tuple(images), labels=parts["labels"])


def micro_batches_of_step(step: int) -> list[list[RawSample]]:
    """The micro-batches of one optimizer step."""
    batches, first = micro_batches(), step * MICRO_BATCHES_PER_STEP
    return [batches[(first + i) % len(batches)] for i in range(MICRO_BATCHES_PER_STEP)]


def official_run(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    trainable: tuple[TrainableGroup, ...] = EVERYTHING,
) -> RunConfig:
    """The configuration under which our step is the official one."""
    return run_config(
        model,
        parallel,
        trainable=trainable,
        optim=dict(
            peak_lr=PEAK_LR,
            patch_embedding_lr=PATCH_EMBEDDING_LR,
            min_lr=0.0,
            warmup_fraction=WARMUP_FRACTION,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            weight_decay=0.0,
            clip_grad=None,
            loss_normalization="official",
            loss_group_samples=LARGEST_MICRO_BATCH,
        ),
    )


def packs(batches: list[list[RawSample]], model: ModelConfig) -> list[Pack]:
    """The samples of all micro-batches as the product packs those of a step: best fit, across micro-batches."""
    shape = PackShape(pack_tokens=TOKENS, align=ALIGN)
    items, members, images = [], [], []
    for number, samples in enumerate(batches):
        for place, sample in enumerate(samples, start=number * LARGEST_MICRO_BATCH):
            tokens = _expanded(sample, model)
            num_vision = int(tokens.is_vision.sum())
            items.append(Item(len(items), num_vision, tokens.ids.size - num_vision, place))
            members.append(PackMember(str(place), tokens, None, place))
            images.append([_patches(image, model) for image in sample.images])
    nothing = np.empty((0, model.dense_stride**2, 3 * model.patch_stride**2), np.uint8)
    return [
        assemble_pack(
            [members[item.sample] for item in pack],
            patches=np.concatenate([nothing, *(p for item in pack for p in images[item.sample])]),
            shape=shape,
            pad_id=0,
            step_places=len(batches) * LARGEST_MICRO_BATCH,
        )
        for pack in pack_batch(items, shape=shape)
    ]


def _expanded(sample: RawSample, model: ModelConfig) -> ExpandedSample:
    edge = model.pixels_per_token
    grids = [(image.shape[1] // edge, image.shape[2] // edge) for image in sample.images]
    encoded = EncodedSample(sample.ids.numpy(), sample.labels.numpy(), was_cut=False)
    return expand(encoded, grids=grids)


def _patches(image: Tensor, model: ModelConfig) -> NDArray[np.uint8]:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return patchify(pixels, patch_stride=model.patch_stride, dense_stride=model.dense_stride)


def convert(source: Path, dest: Path) -> None:
    """In workers: `python -m checkpoints_convert hf-to-megatron SOURCE DEST`."""
    from checkpoints_convert.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["hf-to-megatron", str(source), str(dest)]) == 0


def logits_of_first_batch(config: RunConfig, weights: Path) -> Tensor:
    """In workers: [L, V] at the labelled rows of micro-batch 0, sample after sample."""
    from megatron_eve.training.step import rank_micro_batches

    (chunk,), _, state, _ = build(config, weights=str(weights))
    (pack,) = packs(micro_batches()[:1], config.model)
    (batch,) = rank_micro_batches([pack], config=config, state=state)
    with torch.no_grad():
        part = chunk.logits(batch)
    parts = [torch.empty_like(part) for _ in range(config.parallel.tensor)]
    torch.distributed.all_gather(parts, part.contiguous(), group=state.groups.tp)
    logits = torch.cat(parts, dim=1)[: pack.label_rows.numel(), : config.model.vocab_size]
    return logits[pack.modality_order[pack.label_rows].argsort()]


def gradients_of_first_batch(config: RunConfig, weights: Path, out: Path) -> float:
    """In workers: the loss of micro-batch 0; its gradients go to `out` as a weights folder."""
    from megatron_eve.training.step import forward_backward
    from tests.support.save_weights import save_weights

    training, state = build_all(config, weights=str(weights))
    (chunk,), wrapped = training.chunks, training.wrapped
    batch = packs(micro_batches()[:1], config.model)
    (logged,) = forward_backward(wrapped, batch, config=config, state=state)
    for param in chunk.parameters():
        param.data.copy_(param.main_grad)
    save_weights([chunk], out, config_text="")
    return float(logged[0] / logged[1])


def train(config: RunConfig, weights: Path, out: Path) -> list[dict[str, float]]:
    """In workers: the metrics of each of the 20 steps; the weights after them go to `out`."""
    from megatron_eve.training.step import train_step
    from tests.support.save_weights import save_weights

    training, state = build_all(config, weights=str(weights), steps=STEPS)
    (chunk,), wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    metrics = []
    for step in range(STEPS):
        batch = packs(micro_batches_of_step(step), config.model)
        result = train_step(
            wrapped,
            batch,
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
        metrics.append(result.metrics)
    save_weights([chunk], out, config_text="")
    return metrics
