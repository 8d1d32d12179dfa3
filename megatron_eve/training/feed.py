# SPDX-License-Identifier: Apache-2.0
"""Hands the packs of a data leader to every process that computes on them.

The small metadata goes to the leader's context-parallel group and from there to each model-parallel group (every
pipeline stage needs it), the pixels to the context- and then the tensor-parallel groups of the first stage. All that
happens once per step, before the schedule starts, whatever the packs contain. The number of micro-batches is part of
the broadcast."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_eve.data.sample import VISION_PATCH, Pack
from megatron_eve.parallel.groups import ParallelState


class PackSource(Protocol):
    """Reads packs: megatron_eve.data.loader.PackLoader, or a stand-in in tests."""

    def __next__(self) -> list[Pack]: ...


def next_step(source: PackSource | None, *, state: ParallelState) -> list[Pack]:
    """The micro-batches of this data-parallel rank's next step. Collective over context- and model-parallel groups.

    `source` is None on every process but the data leader. Pixels arrive on the first pipeline stage only."""
    packs = next(source) if source is not None else []
    groups = [group for group in _metadata_groups(state) if group.size() > 1]
    if not groups:
        return packs
    box = [[dataclasses.replace(pack, patches=None) for pack in packs]]
    for group in groups:
        leader = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast_object_list(box, src=leader, group=group, device=state.device)
    if not state.is_first_stage:
        return box[0]
    return _with_pixels(box[0], packs, state=state)


def _metadata_groups(state: ParallelState) -> list[ProcessGroup]:
    """The metadata goes along the first group to the leaders of the model-parallel groups."""
    leads = state.tp_rank == 0 and state.pp_rank == 0
    return [state.groups.cp, state.groups.mp] if leads else [state.groups.mp]


def _pixel_groups(state: ParallelState) -> list[ProcessGroup]:
    return [state.groups.cp, state.groups.tp] if state.tp_rank == 0 else [state.groups.tp]


def _with_pixels(metadata: list[Pack], packs: list[Pack], *, state: ParallelState) -> list[Pack]:
    counts = [int((pack.vision_kind == VISION_PATCH).sum()) for pack in metadata]
    shape = [
        torch.tensor(packs[0].patches.shape[1:])
        if packs and packs[0].patches is not None
        else torch.zeros(2, dtype=torch.int64)
    ]
    pixels = _broadcast_pixels(packs, num_patches=sum(counts), shape=shape[0], state=state)
    return [
        dataclasses.replace(pack, patches=part)
        for pack, part in zip(metadata, pixels.split(counts), strict=True)
    ]


def _broadcast_pixels(
    packs: list[Pack], *, num_patches: int, shape: Tensor, state: ParallelState
) -> Tensor:
    shape = shape.to(state.device)
    for group in _pixel_groups(state):
        leader = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(shape, src=leader, group=group)
    if packs:
        pixels = torch.cat([pack.patches for pack in packs]).to(state.device)  # type: ignore[misc]
    else:
        pixels = torch.empty(num_patches, *shape.tolist(), dtype=torch.uint8, device=state.device)
    for group in _pixel_groups(state):
        leader = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast(pixels, src=leader, group=group)
    return pixels
