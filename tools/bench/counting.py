# SPDX-License-Identifier: Apache-2.0
"""Bytes that a training process holds and sends, by counting tensors: no allocator, no estimate.

For a model wrapped for data parallelism and its megatron-core optimizer; traffic is counted where collectives pass
torch's dispatcher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCALAR_BYTES = 256
"""Collectives up to this size carry losses, counts and norms, not weights or gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBytes:
    """Of one process."""

    weights: int
    gradient_buffers: int  # megatron-core's, padding included
    optimizer_state: int  # moments, and main weights that are not views of the model's


def held_bytes(wrapped: Sequence[Any], optimizer: Any) -> HeldBytes:
    """`wrapped`: DistributedDataParallel chunks; `optimizer`: after its first step, which allocates the moments."""
    params = [param for chunk in wrapped for param in chunk.module.parameters()]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
    model_storages = {_storage(tensor) for tensor in params}
    state: dict[int, torch.Tensor] = {}
    for inner in (chained.optimizer for chained in optimizer.chained_optimizers):
        tensors: Iterable[Any] = (value for of in inner.state.values() for value in of.values())
        main = (param for group in inner.param_groups for param in group["params"])
        for tensor in (*tensors, *main):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in model_storages:
                state[id(tensor)] = tensor
    return HeldBytes(
        weights=sum(param.nbytes for param in params),
        gradient_buffers=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer_state=sum(tensor.nbytes for tensor in state.values()),
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, slots=True)
class Collective:
    """One call."""

    name: str  # of torch's operator, e.g. allreduce_
    nbytes: int  # of the whole tensor: what goes into a reduction, what comes out of a gather


class CollectiveTraffic(TorchDispatchMode):
    """Within this context, lists every collective of this process in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            sides = [
                sum(leaf.nbytes for leaf in tree_leaves(arg) if isinstance(leaf, torch.Tensor))
                for arg in args
            ]
            self.calls.append(Collective(func._schema.name.split("::")[1], max(sides, default=0)))
        return func(*args, **(kwargs or {}))

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes by operator, of the collectives that carry more than a few numbers."""
        total: dict[str, int] = {}
        for call in self.calls:
            if call.nbytes > SCALAR_BYTES:
                total[call.name] = total.get(call.name, 0) + call.nbytes
        return total
