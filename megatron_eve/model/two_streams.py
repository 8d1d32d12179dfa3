# SPDX-License-Identifier: Apache-2.0
"""Partitioned modules whose vision branch runs on a second CUDA stream beside the text branch.

Two products one after the other leave part of the GPU idle in the last wave of each; side by side they share it. Off by
default (gpu.modality_streams) and never run on a GPU yet, see docs/gpu.md. Autograd runs each branch's backward on the
stream of its forward. On a CPU both streams are the calling thread's, in order.

Needs products whose workspaces differ by stream: PyTorch's do; Transformer Engine's are made to (te.py)."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_eve.model.partitioned import (
    ModalityPartitionedLinear,
    ModalityPartitionedMLP,
    segments,
)


@functools.cache
def _side_stream(device: torch.device | int) -> torch.cuda.Stream:
    """One for all modules of a process: a fork and a join surround every use."""
    return torch.cuda.Stream(device)


def on_two_streams(
    vision: Callable[[], Tensor], text: Callable[[], Tensor], *, reads: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Results of both calls, `vision` on the side stream. `reads`: tensors of the current stream that `vision` reads.

    record_stream keeps the allocator from handing out memory, freed on one stream, that the other still works on."""
    main = torch.cuda.current_stream()
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(main)
    with torch.cuda.stream(side):
        seen = vision()
    said = text()
    main.wait_stream(side)
    for tensor, user in [*((tensor, side) for tensor in reads), (seen, main)]:
        if tensor.is_cuda:
            tensor.record_stream(user)
    return seen, said


class TwoStreamLinear(ModalityPartitionedLinear):
    """ModalityPartitionedLinear on two streams."""

    def forward(self, x: Tensor, num_vision_rows: int) -> tuple[Tensor, None]:
        """As the parent's."""
        vision, text = segments(x, num_vision_rows)
        parts = on_two_streams(
            lambda: self.vision(vision)[0], lambda: self.text(text)[0], reads=[vision]
        )
        return torch.cat(parts), None


class TwoStreamMLP(ModalityPartitionedMLP):
    """ModalityPartitionedMLP on two streams; one fork and join for both linears of a branch."""

    def forward(self, x: Tensor, num_vision_rows: int) -> tuple[Tensor, None]:
        """As the parent's."""
        vision, text = segments(x, num_vision_rows)
        parts = on_two_streams(
            lambda: self._branch(vision, "vision"),
            lambda: self._branch(text, "text"),
            reads=[vision],
        )
        return torch.cat(parts), None
