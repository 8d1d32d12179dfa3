# SPDX-License-Identifier: Apache-2.0
"""Counts what a training process holds, sends and multiplies: no allocator, no estimate.

Bytes are those of tensors of a model wrapped for data parallelism and its megatron-core optimizer. Traffic and FLOPs
are counted where collectives and matrix products pass torch's dispatcher."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

SCALAR_BYTES = 256
"""Collectives up to this size carry losses, counts and norms, not weights or gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldBytes:
    """Bytes that one process holds."""

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


Shape = tuple[int, ...]


def executed_flops_of(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products and convolutions that `work` runs on the CPU, backward and recomputation included.

    By torch's FlopCounterMode, a product [m, k] x [k, n] as 2 m k n. torch has no formula for the CPU's attention
    kernel and would count zero, so that is counted here: what it multiplies, not what a mask lets through. Under
    `is_causal` it leaves out the keys behind a query, with a mask it does not; its backward computes the scores again.
    Not for a GPU, whose kernels torch counts without regard to `is_causal`."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return counter.get_total_flops()


def _attention(
    query: Shape,
    key: Shape,
    value: Shape,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    products: int = 2,  # scores, and their product with v
    out_shape: object = None,
    **_: object,
) -> int:
    """Shapes: query [B, N, n, D]; key, value [B, K, m, D]."""
    (batch, heads, num_queries, dim), num_keys = query, key[2]
    pairs = num_queries * num_keys
    if is_causal:
        pairs = sum(min(number + 1, num_keys) for number in range(num_queries))
    return products * 2 * batch * heads * dim * pairs


def _attention_backward(
    grad: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    out: Shape,
    log_sum_exp: Shape,
    dropout: float = 0.0,
    is_causal: bool = False,
    **_: object,
) -> int:
    """Scores once more, and the gradients of q, k, v and of the probabilities."""
    return _attention(query, key, value, dropout, is_causal, products=5)
