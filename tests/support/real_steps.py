# SPDX-License-Identifier: Apache-2.0
"""Training steps on what the product's own data path makes of shards, and the same samples one official micro-batch
after another through the plain reference.

The reference takes the samples in the order of the plan's epoch, not from packs: ids and labels from the row's text,
pixels by Pillow alone. Images are PNGs of a size that no rule changes, so that both decoders give the same bits."""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_eve.config.schema import BatchConfig, RunConfig, ShardSource
from megatron_eve.data.plan.lengths import LengthSettings, load_lengths
from megatron_eve.data.plan.order import SampleOrder
from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.row import MDS_COLUMNS, to_row
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.streaming_import import MDSWriter
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.data.sample import IGNORE, Sample, Turn
from tests.support.canonical import Shard, local_shards
from tests.support.matrix import EPS, Layout, complete_gradients, gradient_or_none, step_config
from tests.support.reference_eve import ReferenceEve, batch_loss
from tests.support.tiny import RawSample, tiny_model

VOCAB = 320
MODEL = dataclasses.replace(tiny_model(), vocab_size=VOCAB, max_position_embeddings=512)
EDGE = 16  # pixels of most images: 4 x 4 tokens
GREY = (122, 116, 104)  # where an image cannot be decoded
WORDS = ("red", "green", "blue", "light", "stands", "over", "water", "house", "tree", "near")


def sample_of(number: int, *, source: str, is_caption: bool) -> Sample:
    """Every third answer is one word, the others are long; every fourth question has no image; every fifth image of a
    caption cannot be decoded."""
    rng = np.random.default_rng([number, is_caption])
    words = 1 if number % 3 == 0 else int(rng.integers(25, 60))
    answer = " ".join(rng.choice(WORDS, words))
    with_image = is_caption or number % 4 != 0
    height, width = EDGE, EDGE + 4 * int(rng.integers(0, 3))
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    data = b"no picture" if is_caption and number % 5 == 0 else buffer.getvalue()
    mark = "<image>\n" if with_image else ""
    return Sample(
        id=f"{source}-{number}",
        images=(data,) if with_image else (),
        image_sizes=((height, width),) if with_image else (),
        turns=(Turn("human", f"{mark}what is this"), Turn("gpt", answer)),
        source=source,
    )


def write_data(folder: Path) -> Path:
    """`folder` with two sources of MDS shards, `captions` and `questions`, and a small tokenizer."""
    from data_prep.__main__ import main as data_prep

    rows = []
    for source, count in (("captions", 26), ("questions", 40)):
        samples = [
            sample_of(number, source=source, is_caption=source == "captions")
            for number in range(count)
        ]
        out = str(folder / source)
        with MDSWriter(out=out, columns=MDS_COLUMNS, hashes=["xxh3_64"], size_limit=9000) as writer:
            for sample in samples:
                writer.write(to_row(sample))
        turns = [[{"from": turn.role, "value": turn.text} for turn in s.turns] for s in samples]
        rows += [{"id": s.id, "conversations": t} for s, t in zip(samples, turns, strict=True)]
    (folder / "text.json").write_text(json.dumps(rows))
    arguments = [str(folder / "text.json"), str(folder / "tokenizer"), "--vocab-size", str(VOCAB)]
    assert data_prep(["tokenizer", "train", *arguments]) == 0
    return folder


def real_config(folder: Path, spread: Layout, *, batch: BatchConfig, **optim: Any) -> RunConfig:
    """Steps of `batch`, everything trained at a learning rate of 0, so that each step has the first one's weights.

    Samples are aligned for context parallelism in every layout, so that a run can go on in another."""
    sources = tuple(
        ShardSource(path=str(folder / name), proportion=proportion, template=template)
        for name, proportion, template in (("captions", 26.0, "plain"), ("questions", 40.0, "qwen2"))
    )  # fmt: skip
    data = dict(
        sources=sources, tokenizer=str(folder / "tokenizer"), image_edge=64, max_text_tokens=300,
        pack_tokens=384, align=8, sample_align=4, open_bins=3, shuffle_block_size=512, num_workers=0, seed=25,
    )  # fmt: skip
    optim = {"peak_lr": 0.0, "patch_embedding_lr": 0.0, "adam_eps": EPS} | optim
    config = step_config(MODEL, spread, stage="2.2", data=data)
    return dataclasses.replace(
        config, batch=batch, optim=dataclasses.replace(config.optim, **optim)
    )


@dataclass(frozen=True)
class RealStep:
    """What one process saw of a step."""

    metrics: dict[str, float]
    gradients: list[Shard]
    packs: list[tuple[tuple[str, ...], tuple[int, ...]]]  # ids and places of each pack's samples
    state: dict[str, Any] | None  # of the loader, after the step


def take_real_steps(
    configs: Sequence[RunConfig],
    weights: str,
    *,
    steps: int,
    state_before: dict[str, Any] | None = None,
    fault: str | None = None,
) -> list[list[RealStep]]:
    """`steps` of each configuration, all of the same layout, in a gloo worker: loader, feed and train step are the
    product's. `state_before`: of a loader, to go on from. `fault`: a mutation of training/loss.py."""
    from megatron_eve.parallel.groups import init_model_parallel

    state = init_model_parallel(configs[0].parallel, seed=1)
    with _broken(fault):
        return [
            _take(config, weights, steps=steps, state=state, state_before=state_before)
            for config in configs
        ]


def _take(
    config: RunConfig, weights: str, *, steps: int, state: Any, state_before: dict[str, Any] | None
) -> list[RealStep]:
    from megatron_eve.data.loader import PackLoader
    from megatron_eve.training.feed import next_step
    from megatron_eve.training.step import train_step
    from tests.support.train_once import build_all

    training, state = build_all(config, weights=weights, state=state)
    chunks, wrapped, optimizer = training.chunks, training.wrapped, training.optimizer
    schedule = training.schedule
    loader = None
    if state.is_data_leader:
        loader = PackLoader(
            data=config.data,
            batch=config.batch,
            model=config.model,
            trainable=config.stage.trainable,
            tokenizer=load_tokenizer(config.data.tokenizer),
            data_rank=state.dp_rank,
            data_size=state.dp_size,
            device="cpu",
        )
        if state_before is not None:
            loader.load_state_dict(state_before)
    found = []
    for _ in range(steps):
        packs = next_step(loader, state=state)
        result = train_step(
            wrapped,
            packs,
            optimizer=optimizer,
            schedule=schedule,
            config=config,
            state=state,
            stop_requested=False,
        )
        for chunk in wrapped:
            complete_gradients(chunk, state)
        found.append(
            RealStep(
                metrics=result.metrics,
                gradients=local_shards(chunks, gradient_or_none),
                packs=[(pack.sample_ids, pack.sample_places) for pack in packs],
                state=None if loader is None else loader.state_dict(),
            )
        )
    return found


def _broken(fault: str | None) -> Any:
    """One denominator wrong: a group that counts a label token too many, or ranks that count only their own packs."""
    from contextlib import nullcontext
    from unittest import mock

    import megatron_eve.training.loss as module

    if fault == "group":
        sums = module._sums_of_groups

        def with_a_label_too_many(counts: Tensor, *, size: int) -> Tensor:
            found = sums(counts, size=size)
            found[: 2 * size] += (torch.arange(2 * size) >= size).double()  # of the second group
            return found

        return mock.patch.object(module, "_sums_of_groups", with_a_label_too_many)
    if fault == "exchange":
        return mock.patch.object(module.torch.distributed, "all_reduce", _only_gradients)
    return nullcontext()


_all_reduce = torch.distributed.all_reduce


def _only_gradients(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Label counts, a table of whole numbers in two rows, stay with their rank."""
    if tensor.dtype == torch.int64 and tensor.dim() == 2:
        return None
    return _all_reduce(tensor, *args, **kwargs)


def samples_in_data_order(config: RunConfig) -> list[tuple[str, RawSample]]:
    """(id, sample) of the first epoch, as the reference wants them."""
    table = ShardTable.open([source.path for source in config.data.sources])
    settings = LengthSettings.of_sources(config.data, model=config.model)
    tokenizer = load_tokenizer(config.data.tokenizer)
    shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)
    lengths = load_lengths(
        table, settings=settings, tokenizer=tokenizer, shape=shape, max_unreadable=0
    )
    order = SampleOrder(table=table, lengths=lengths, data=config.data)
    found = []
    for index in order.epoch(0).tolist():
        sample = table.read(index)
        encoded = encode_sample(
            sample.turns,
            num_images=len(sample.images),
            template=settings[table.source_of(index)].template,
            tokenizer=tokenizer,
            max_text_tokens=config.data.max_text_tokens,
        )
        images, labels = [], torch.from_numpy(encoded.labels)
        for data, (height, width) in zip(sample.images, sample.image_sizes, strict=True):
            try:
                pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            except OSError:
                pixels = np.full((height, width, 3), GREY, np.uint8)
                labels = torch.full_like(labels, IGNORE)
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        found.append((sample.id, RawSample(torch.from_numpy(encoded.ids), tuple(images), labels)))
    return found


def reference_gradients(
    eve: ReferenceEve, samples: Sequence[RawSample], *, config: RunConfig
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, by names of an EveModel, of one step of these samples, in data order."""
    from checkpoints_convert.tensors import hf_to_eve

    size = config.optim.loss_group_samples or 1
    references = [sample.reference() for sample in samples]
    groups = [references[i : i + size] for i in range(0, len(references), size)]
    eve.zero_grad(set_to_none=True)
    loss = batch_loss(eve, groups, normalization=config.optim.loss_normalization)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in eve.named_parameters() if p.grad is not None}
    return float(loss), hf_to_eve(gradients, config.model)
