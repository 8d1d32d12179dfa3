# SPDX-License-Identifier: Apache-2.0
"""From what each rank holds to whole tensors under the names of an unsharded EveModel, without a checkpoint.

The layout comes from the model's own `sharded_state_dict` (tests/checkpoint shows that it is right). Ranks that hold
the same part must hold the same bits: replicas of a weight that drift apart are a bug that no loss shows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STACKED = "decoder.layers."


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a canonical tensor; picklable without shared memory."""

    name: str  # layers are stacked along a leading axis, as in checkpoints
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    values: NDArray[np.float32]


def local_shards(
    chunks: Sequence[Any], of: Callable[[torch.nn.Parameter], Tensor | None]
) -> list[Shard]:
    """This rank's shards of `of(parameter)`, a tensor of the parameter's shape, or None to leave the parameter out."""
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from megatron_eve.checkpoint.sharding import sharded_weights

    found = []
    for chunk in sharded_weights(chunks).values():
        kept = {}
        for name, value in chunk.items():
            value.data = of(value.data)
            if value.data is not None:
                kept[name] = value
        apply_factories(kept)  # SwiGLU's gate and up are two shards of one parameter
        found += [_shard(part) for value in kept.values() for part in _parts(value)]
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]


def _shard(part: Any) -> Shard:
    values = part.data.detach().float().clone().numpy()
    return Shard(
        name=part.key,
        offset=tuple(part.global_offset),
        global_shape=tuple(part.global_shape),
        values=values.reshape((1,) * part.prepend_axis_num + values.shape),
    )


def assemble(ranks: Iterable[Sequence[Shard]]) -> dict[str, Tensor]:
    """Whole tensors by the names of an unsharded model.

    Raises: AssertionError if a part is missing, or if two ranks hold different bits of the same part."""
    whole: dict[str, NDArray[np.float32]] = {}
    for shard in (shard for rank in ranks for shard in rank):
        tensor = whole.setdefault(shard.name, np.full(shard.global_shape, np.nan, np.float32))
        place = tuple(
            slice(begin, begin + size)
            for begin, size in zip(shard.offset, shard.values.shape, strict=True)
        )
        if np.isnan(tensor[place]).all():
            tensor[place] = shard.values
        else:
            gap = np.abs(tensor[place] - shard.values).max()
            assert gap == 0, f"{shard.name}: two ranks' copies differ by {gap:.1e}"
    missing = [name for name, tensor in whole.items() if np.isnan(tensor).any()]
    assert not missing, f"no rank holds all of {missing}, or it is not a number"
    return dict(_unstacked(whole))


def _unstacked(whole: dict[str, NDArray[np.float32]]) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in whole.items():
        if name.startswith(STACKED):
            rest = name.removeprefix(STACKED)
            yield from ((f"{STACKED}{i}.{rest}", torch.from_numpy(t)) for i, t in enumerate(tensor))
        else:
            yield name, torch.from_numpy(tensor)
