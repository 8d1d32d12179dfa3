# SPDX-License-Identifier: Apache-2.0
"""Hands every process of a model-parallel group the packs that its data leader has read.

One broadcast of the small metadata to the whole group (every pipeline stage needs it), one of the pixels to the
tensor-parallel group of the first stage. Both happen once per step, before the schedule starts, whatever the packs
contain. The number of micro-batches is part of the broadcast."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from megatron_eve.data.sample import VISION_PATCH, Pack
from megatron_eve.parallel.groups import ParallelState


class PackSource(Protocol):
    """What reads packs: megatron_eve.data.loader.PackLoader, or a stand-in in tests."""

    def __next__(self) -> list[Pack]: ...


def next_step(source: PackSource | None, *, state: ParallelState) -> list[Pack]:
    """The micro-batches of this data-parallel rank's next step. Collective over the model-parallel group.

    `source` is None on every process but the data leader. Pixels arrive on the first pipeline stage only."""
    packs = next(source) if source is not None else []
    group = state.groups.mp
    if group.size() == 1:
        return packs
    box = [[dataclasses.replace(pack, patches=None) for pack in packs]]
    leader = torch.distributed.get_global_rank(group, 0)
    torch.distributed.broadcast_object_list(box, src=leader, group=group, device=state.device)
    if not state.is_first_stage:
        return box[0]
    return _with_pixels(box[0], packs, state=state)


def _with_pixels(metadata: list[Pack], packs: list[Pack], *, state: ParallelState) -> list[Pack]:
    counts = [int((pack.vision_kind == VISION_PATCH).sum()) for pack in metadata]
    shape = [
        torch.tensor(packs[0].patches.shape[1:])
        if packs and packs[0].patches is not None
        else torch.zeros(2, dtype=torch.int64)
    ]
    pixels = _broadcast_pixels(packs, rows=sum(counts), shape=shape[0], state=state)
    return [
        dataclasses.replace(pack, patches=part)
        for pack, part in zip(metadata, pixels.split(counts), strict=True)
    ]


def _broadcast_pixels(
    packs: list[Pack], *, rows: int, shape: Tensor, state: ParallelState
) -> Tensor:
    group = state.groups.tp
    leader = torch.distributed.get_global_rank(group, 0)
    shape = shape.to(state.device)
    torch.distributed.broadcast(shape, src=leader, group=group)
    if packs:
        pixels = torch.cat([pack.patches for pack in packs]).to(state.device)  # type: ignore[misc]
    else:
        pixels = torch.empty(rows, *shape.tolist(), dtype=torch.uint8, device=state.device)
    torch.distributed.broadcast(pixels, src=leader, group=group)
    return pixels
