# SPDX-License-Identifier: Apache-2.0
"""Counts the matrix products that a process really runs in the forward and backward of a global batch.

Every operator that reaches torch's dispatcher is seen, in the forward and, because a CPU's backward runs on the calling
thread, inside megatron-core's own autograd functions and in recomputation. The formulas are those of torch's
FlopCounterMode; not its mode, whose hooks on modules fail under re-entrant recomputation. It has none for the CPU's
attention kernel and would count zero, so that stands here: the pairs that a causal mask lets through, all pairs where
there is no mask or an explicit one, two products forward and five backward (this kernel keeps no scores)."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_eve.config.schema import RunConfig
from megatron_eve.data.sample import Pack
from megatron_eve.training.step import forward_backward, train_step
from tests.support.train_once import build_all, run_config

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of the operators called while it is entered, and those of them that an explicit mask wastes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.masked_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = func.overloadpacket
        if operator is _ATTENTION:
            self._add_attention(2, *args, **kwargs)
        elif operator is _ATTENTION_BACKWARD:
            _, query, key, value, _, _, *masking = args
            self._add_attention(5, query, key, value, *masking, **kwargs)
        elif operator not in flop_registry:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if operator in flop_registry:
            self.flops += flop_registry[operator](*args, **kwargs, out_val=out)
        return out

    def _add_attention(
        self,
        products: int,
        query: Any,
        key: Any,
        value: Any,
        dropout: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Any = None,
        scale: float | None = None,
    ) -> None:
        """`products` over pairs of query [B, N, n, D] and key [B, K, m, D]; a mask [n, m] is 0 where one may look."""
        (batch, heads, num_queries, dim), num_keys = query.shape, key.shape[2]
        pairs, hidden = num_queries * num_keys, 0
        if is_causal:
            pairs = sum(min(number + 1, num_keys) for number in range(num_queries))
        if attn_mask is not None:
            hidden = int((attn_mask != 0).sum())
        self.flops += products * 2 * batch * heads * dim * pairs
        self.masked_flops += products * 2 * batch * heads * dim * hidden


def executed_on_rank(config: RunConfig, packs: list[Pack], *, behind_masks_too: bool = True) -> int:
    """FLOPs of this rank in one forward and backward of all `packs`, the same on every data-parallel rank."""
    training, state = build_all(config, weights=None)
    with FlopCounter() as counter:
        forward_backward(training.wrapped, packs, config=config, state=state)
    return counter.flops - (0 if behind_masks_too else counter.masked_flops)


def products_of_a_linear(*, trained: bool, input_requires_grad: bool) -> int:
    """FLOPs of megatron-core's linear, 3 rows of 5 to 7 columns, forward and backward."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_eve.model.build import build_model
    from megatron_eve.parallel.groups import init_model_parallel
    from tests.support.tiny import layout, tiny_model

    state = init_model_parallel(layout(), seed=1)
    _, mcore = build_model(run_config(tiny_model(), layout()), state=state)
    linear = ColumnParallelLinear(
        5, 7, config=mcore, init_method=torch.nn.init.ones_, tp_group=state.groups.tp
    )
    linear.weight.requires_grad_(trained)
    x = torch.ones(3, 1, 5, requires_grad=input_requires_grad)
    with FlopCounter() as counter:
        linear(x)[0].sum().backward()
    return counter.flops


def step_metrics(config: RunConfig, packs: list[list[Pack]]) -> dict[str, float]:
    """Metrics of one training step in which data-parallel rank r has `packs[r]`."""
    training, state = build_all(config, weights=None)
    return train_step(
        training.wrapped,
        packs[state.dp_rank],
        optimizer=training.optimizer,
        schedule=training.schedule,
        config=config,
        state=state,
        stop_requested=False,
    ).metrics
