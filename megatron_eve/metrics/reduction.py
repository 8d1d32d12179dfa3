# SPDX-License-Identifier: Apache-2.0
"""Turns the numbers of each data-parallel rank into the numbers of the run, by the reductions that definitions.py
declares. Two small collectives at most (one sum, one maximum), whatever the number of metrics; for logged steps."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_eve.metrics.definitions import METRICS


def reduce_over_ranks(
    values: Mapping[str, float], *, group: dist.ProcessGroup, device: torch.device
) -> dict[str, float]:
    """The reduced values, in the order given, the same on every rank of `group`.

    A collective: every rank calls it with the same names. float64 on the device, so counts stay exact to 2^53.
    """
    result = dict(values)
    for reduction, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
        names = [name for name in values if METRICS[name].reduction == reduction]
        result |= _all_reduce(values, names=names, op=op, group=group, device=device)
    return result


def _all_reduce(
    values: Mapping[str, float],
    *,
    names: list[str],
    op: dist.ReduceOp.RedOpType,
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[str, float]:
    if not names:
        return {}
    numbers = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op=op, group=group)
    return dict(zip(names, numbers.tolist(), strict=True))
