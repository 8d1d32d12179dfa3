# SPDX-License-Identifier: Apache-2.0
"""Bytes that a really built tiny model holds and keeps, counted inside gloo workers."""

from typing import Any

import torch
from torch import Tensor

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.sample import Pack
from megatron_eve.training.step import rank_micro_batches, train_step
from tests.support.train_once import build, build_all
from tools.bench.counting import held_bytes


def kept_bytes(config: RunConfig, pack: Pack, *, only_rank: int | None = None) -> int:
    """Of one forward up to the loss of each row: storages of floating-point tensors that autograd saved, each counted
    once, without weights and without what the routing brings (RoPE tables). `only_rank`: 0 on all others, for a
    pipeline's first stage, which waits for nobody."""
    _, wrapped, state, _ = build(config, weights=None)
    if only_rank not in (None, torch.distributed.get_rank()):
        return 0
    (batch,) = rank_micro_batches([pack], config=config, state=state)
    weights = {_pointer(p) for chunk in wrapped for p in chunk.parameters()}
    weights |= {_pointer(buffer.grad_data) for chunk in wrapped for buffer in chunk.buffers}
    saved: dict[int, Tensor] = {}

    def pack_tensor(tensor: Tensor) -> Tensor:
        is_table = tensor.shape[1:] == (1, config.model.head_dim) and not tensor.requires_grad
        if tensor.is_floating_point() and not is_table and _pointer(tensor) not in weights:
            saved[_pointer(tensor)] = tensor  # keeps the storage, so that no pointer is used twice
        return tensor

    chunk = wrapped[0]
    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        out = chunk(batch)
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def held(config: RunConfig, pack: Pack) -> dict[str, int]:
    """Weights, gradient buffers and optimizer state after one step."""
    training, state = build_all(config, weights=None)
    wrapped, optimizer = training.wrapped, training.optimizer
    train_step(
        wrapped,
        [pack],
        optimizer=optimizer,
        schedule=training.schedule,
        config=config,
        state=state,
        stop_requested=False,
    )
    counted: Any = held_bytes(wrapped, optimizer)
    return {
        "weights": counted.weights,
        "gradients": counted.gradient_buffers,
        "optimizer": counted.optimizer_state,
    }


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
