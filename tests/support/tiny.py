# SPDX-License-Identifier: Apache-2.0
"""Tiny models, layouts and packs for tests."""

import dataclasses

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig, ParallelConfig, SplitConfig
from megatron_eve.data.sample import (
    IGNORE,
    VISION_CLS,
    VISION_PAD,
    VISION_PATCH,
    VISION_SPL,
    Pack,
)
from megatron_eve.model.patch_embedding import CLIP_MEAN, CLIP_STD
from tests.support.reference_eve import IMAGE_PLACEHOLDER, ReferenceSample

ALL = SplitConfig(norm=True, attention=True, ffn=True)
DENSE = SplitConfig(norm=False, attention=False, ffn=False)


def tiny_model(split: SplitConfig = ALL, *, tied: bool = False, layers: int = 4) -> ModelConfig:
    """Four heads in two groups, patches of 2x2 pixels in windows of 2x2, so a token is 4x4 pixels."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=61,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        init_std=0.02,
        split=split,
        patch_stride=2,
        dense_stride=2,
        patch_embed_dim=12,
    )


def layout(
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    *,
    virtual: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    overlap: bool = False,
) -> ParallelConfig:
    """A layout of tensor x pipeline x data x context processes on one node."""
    return ParallelConfig(
        num_nodes=1,
        gpus_per_node=tensor * pipeline * data * context,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        context=context,
        sequence_parallel=sequence_parallel,
        distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
    )


@dataclasses.dataclass(frozen=True)
class RawSample:
    """A sample as token ids with image placeholders, uint8 images [3, H, W] and labels aligned with ids."""

    ids: Tensor
    images: tuple[Tensor, ...]
    labels: Tensor
    place: int | None = None  # in data order, in a step of packs that are not in this order

    def reference(self) -> ReferenceSample:
        """The same sample with normalised pixels."""
        mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
        images = tuple((image.float() / 255 - mean) / std for image in self.images)
        return ReferenceSample(ids=self.ids, images=images, labels=self.labels)


def random_samples(count: int, *, seed: int, vocab: int = 61, edge: int = 4) -> list[RawSample]:
    """A mix: one image first, no image, two images, a single labelled token, a sample without label."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for index in range(count):
        kind = index % 5
        pieces, images = [], []
        for _ in range({0: 1, 1: 0, 2: 2, 3: 1, 4: 1}[kind]):
            if kind != 0:
                pieces.append(torch.randint(0, vocab, (number(1, 4),), generator=generator))
            pieces.append(torch.tensor([IMAGE_PLACEHOLDER]))
            shape = (3, edge * number(1, 4), edge * number(1, 4))
            images.append(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        pieces.append(torch.randint(0, vocab, (number(3, 9),), generator=generator))
        ids = torch.cat(pieces)
        labels = ids.clone()
        labels[ids == IMAGE_PLACEHOLDER] = IGNORE
        if kind in (2, 3):
            labels[: -1 if kind == 3 else -2] = IGNORE
        if kind == 4:
            labels[:] = IGNORE
        samples.append(RawSample(ids, tuple(images), labels))
    return samples


def patch_rows(image: Tensor, model: ModelConfig) -> Tensor:
    """[3, H, W] -> [rows * cols, d * d, 3 * p * p], naively."""
    p, d = model.patch_stride, model.dense_stride
    rows, cols = image.shape[1] // (p * d), image.shape[2] // (p * d)
    out = []
    for row in range(rows):
        for col in range(cols):
            subs = []
            for i in range(d):
                for j in range(d):
                    y, x = (row * d + i) * p, (col * d + j) * p
                    subs.append(image[:, y : y + p, x : x + p].reshape(-1))
            out.append(torch.stack(subs))
    return torch.stack(out)


def _places(samples: list[RawSample], *, first: int) -> tuple[int, ...]:
    return tuple(first + i if s.place is None else s.place for i, s in enumerate(samples))


def naive_pack(
    samples: list[RawSample],
    *,
    model: ModelConfig,
    tokens: int,
    align: int,
    sample_align: int = 1,
    first_place: int = 0,
    step_places: int | None = None,
) -> Pack:
    """A Pack built token by token, not by the product. Samples without a place get those from `first_place` on;
    `step_places`: by default those of this pack alone."""
    kinds: list[int] = []  # per sequence token: vision kind, or -1 for text
    ids: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    paddings: list[int] = []
    patches: list[Tensor] = []
    for sample in samples:
        start, images = len(kinds), iter(sample.images)
        labels: list[int] = []
        for token, label in zip(sample.ids.tolist(), sample.labels.tolist(), strict=True):
            if token != IMAGE_PLACEHOLDER:
                kinds.append(-1)
                ids.append(token)
                labels.append(label)
                continue
            image = next(images)
            edge = model.pixels_per_token
            rows, cols = image.shape[1] // edge, image.shape[2] // edge
            patches.append(patch_rows(image, model))
            layout_of_image = [VISION_CLS] + ([VISION_PATCH] * cols + [VISION_SPL]) * rows
            kinds += layout_of_image
            ids += [0] * len(layout_of_image)
            labels += [IGNORE] * len(layout_of_image)
        padding = -(len(kinds) - start) % sample_align
        kinds += [-1] * padding
        ids += [0] * padding
        labels += [IGNORE] * padding
        lengths.append(len(kinds) - start)
        paddings.append(padding)
        targets += [*labels[1:], IGNORE]
    num_real_vision = sum(kind >= 0 for kind in kinds)
    num_real_text = len(kinds) - num_real_vision
    num_vision = max(align, -(-num_real_vision // align) * align)
    for count, kind in (
        (num_vision - num_real_vision, VISION_PAD),
        (tokens - num_vision - num_real_text, -1),
    ):
        assert count >= 0, "the samples do not fit"
        kinds += [kind] * count
        ids += [0] * count
        targets += [IGNORE] * count
    padding = tokens - sum(lengths)
    lengths += [align] * (padding // align) + ([padding % align] if padding % align else [])
    kind_t, ids_t, targets_t = torch.tensor(kinds), torch.tensor(ids), torch.tensor(targets)
    order = torch.cat([torch.where(kind_t >= 0)[0], torch.where(kind_t < 0)[0]])
    targets_m = targets_t[order]
    rows_m = torch.where(targets_m != IGNORE)[0]
    pixels = model.dense_stride**2, 3 * model.patch_stride**2
    return Pack(
        num_vision=num_vision,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        modality_order=order,
        text_ids=ids_t[kind_t < 0],
        vision_kind=kind_t[kind_t >= 0].to(torch.uint8),
        patches=torch.cat(patches) if patches else torch.empty((0, *pixels), dtype=torch.uint8),
        label_rows=rows_m,
        label_targets=targets_m[rows_m],
        sample_ids=tuple(str(i) for i in range(len(samples))),
        sample_places=_places(samples, first=first_place),
        step_places=step_places or max(1, len(samples)),
        sample_padding=tuple(paddings),
        num_real_vision=num_real_vision,
        num_real_text=num_real_text - sum(paddings),
        quarantined=(),
    )
