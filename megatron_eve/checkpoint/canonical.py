# SPDX-License-Identifier: Apache-2.0
"""Hashes of the canonical (unsharded) tensors, the same for every layout, without a whole tensor on any rank.

The hash of a tensor is the sum modulo 2^64 of mix(index * GOLDEN + bits) over its elements: `index` is the element's
place in the flattened whole tensor, `bits` its bytes as an integer, `mix` the finaliser of splitmix64 (Steele et al.,
OOPSLA 2014), a bijection. A sum does not care who adds what: each rank hashes what it holds, and the ranks' sums are
added. One changed element is always noticed; several changed, exchanged, lost or doubled elements are missed with a
probability of about 2^-64. The number of elements is counted beside it, so a missing part cannot hide. It guards
against accidents, not against an adversary.

We hash the live parameters and optimizer states, not the tensors prepared for the file: a mistake in resharding, ours
or megatron-core's, shows as a difference after the load. Rows that pad the vocabulary to the
tensor-parallel size are left out, because their number depends on the layout.

    decoder.layers.mlp.linear_fc1.text.weight                       a weight; layers are stacked along a leading axis
    optimizer.exp_avg.decoder.layers.mlp.linear_fc1.text.weight     its moment; also exp_avg_sq, and fp32_param in bf16
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

from megatron_eve.checkpoint.sharding import sharded_weights
from megatron_eve.errors import CheckpointError
from megatron_eve.model.eve_model import EveModel

_CHUNK = {
    "cpu": 1 << 16,
    "cuda": 1 << 23,
}  # elements at a time: the processor's cache, some MiB of a GPU
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MODULUS = 1 << 64


def _signed(number: int) -> int:
    return number - _MODULUS if number >= _MODULUS // 2 else number


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


@dataclass(frozen=True, slots=True)
class TensorHash:
    """The hash of one canonical tensor."""

    hash: int
    shape: tuple[int, ...]
    dtype: str

    def as_json(self) -> dict[str, Any]:
        return {"hash": f"{self.hash:016x}", "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "TensorHash":
        return cls(int(entry["hash"], 16), tuple(entry["shape"]), entry["dtype"])


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a canonical tensor: a run of a local parameter's flattened elements."""

    name: str
    first: int  # of the box in the flattened parameter
    shape: tuple[int, ...]  # of the box, as many axes as the canonical tensor has
    offset: tuple[int, ...]  # of the box in the canonical tensor
    whole: tuple[int, ...]  # shape of the canonical tensor
    replica: tuple[int, ...]  # all 0: this copy counts. The last is the data-parallel rank.

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def canonical_hashes(
    chunks: Sequence[EveModel], optimizer: MegatronOptimizer | None = None
) -> dict[str, TensorHash]:
    """Hashes by canonical name, the same on every rank; with `optimizer` also of its states. Collective.

    Raises: CheckpointError if the data-parallel replicas of the weights are not the same bits."""
    sums: dict[str, _Sum] = {}
    parts = dict(_parts_of_parameters(chunks))
    replica_total = 0
    for param, boxes in parts.items():
        for part in boxes:
            value = hash_box(param.detach().reshape(-1), part, begin=0)
            replica_total = (replica_total + value) % _MODULUS
            if not any(part.replica):
                _add(sums, part.name, value, part=part, count=part.size, dtype=param.dtype)
    _refuse_different_replicas(replica_total, chunks)
    for state, param, values, begin, is_spread in _optimizer_states(optimizer):
        for part in parts[param]:
            # With the distributed optimizer each data-parallel rank holds another run, and all of them count.
            if any(part.replica[:-1] if is_spread else part.replica):
                continue
            count = _overlap(part, begin=begin, size=values.numel())
            value = hash_box(values, part, begin=begin)
            name = f"optimizer.{state}.{part.name}"
            _add(sums, name, value, part=part, count=count, dtype=values.dtype)
    return _added_up(sums)


def hash_of_boxes(
    boxes: Iterable[tuple[tuple[int, ...], Tensor]], *, whole: tuple[int, ...], dtype: torch.dtype
) -> TensorHash:
    """The hash of a tensor of shape `whole` from the (offset, values) of its boxes. Not collective."""
    value = 0
    for offset, values in boxes:
        part = _Part("", 0, tuple(values.shape), offset, whole, ())
        value = (value + hash_box(values.reshape(-1), part, begin=0)) % _MODULUS
        del values  # before the next one is read
    return TensorHash(value, whole, str(dtype).removeprefix("torch."))


@dataclass(slots=True)
class _Sum:
    value: int
    count: int
    shape: tuple[int, ...]
    dtype: str


def _add(
    sums: dict[str, _Sum], name: str, value: int, *, part: _Part, count: int, dtype: torch.dtype
) -> None:
    total = sums.setdefault(name, _Sum(0, 0, part.whole, str(dtype).removeprefix("torch.")))
    total.value = (total.value + value) % _MODULUS
    total.count += count


def _added_up(sums: dict[str, _Sum]) -> dict[str, TensorHash]:
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, sums)
    total: dict[str, _Sum] = {}
    for rank in everyone:
        for name, part in rank.items():
            if name in total:
                total[name].value = (total[name].value + part.value) % _MODULUS
                total[name].count += part.count
            else:
                total[name] = part
    for name, found in total.items():
        expected = math.prod(found.shape)
        assert found.count == expected, f"{name}: {found.count} elements hashed, not {expected}"
    return {name: TensorHash(s.value, s.shape, s.dtype) for name, s in sorted(total.items())}


def _refuse_different_replicas(total: int, chunks: Sequence[EveModel]) -> None:
    group = chunks[0].pg_collection.dp_cp
    totals: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(totals, total, group=group)
    problem = None
    if len(set(totals)) > 1:
        ranks = torch.distributed.get_process_group_ranks(group)
        problem = (
            f"the weights of the data-parallel replicas on ranks {ranks} are not the same bits"
        )
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, problem)
    for found in everyone:
        if found is not None:
            raise CheckpointError(found)


def _parts_of_parameters(
    chunks: Sequence[EveModel],
) -> Iterator[tuple[torch.nn.Parameter, list[_Part]]]:
    num_words = chunks[0].model_config.vocab_size
    for chunk in sharded_weights(chunks).values():
        for value in chunk.values():
            param = value.data  # a factory's build() hands out views of it
            boxes, first = [], 0
            for shard in _shards(value):
                boxes.append(_part(shard, first=first, num_words=num_words))
                first += shard.data.numel()
            assert first == param.numel(), f"{value.key}: its shards are not all of it"
            yield param, boxes


def _shards(value: Any) -> list[ShardedTensor]:
    """Shards in the order of the flattened parameter: SwiGLU's gate and up are its two halves."""
    if not isinstance(value, ShardedTensorFactory):
        return [value]
    built = value.build()
    return list(built.values()) if isinstance(built, dict) else list(built)


def _part(shard: ShardedTensor, *, first: int, num_words: int) -> _Part:
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    offset, whole = tuple(shard.global_offset), tuple(shard.global_shape)
    if shard.allow_shape_mismatch:  # has a row for each token, padded
        rows = min(max(num_words - offset[0], 0), shape[0])
        shape, whole = (rows, *shape[1:]), (num_words, *whole[1:])
    replica = shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)
    return _Part(shard.key, first, shape, offset, whole, replica)


def _optimizer_states(
    optimizer: MegatronOptimizer | None,
) -> Iterator[tuple[str, torch.nn.Parameter, Tensor, int, bool]]:
    """(name, model parameter, flat values, their begin in the flattened parameter, spread over data-parallel ranks)."""
    if optimizer is None:
        return
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        for param, main, begin, states in _states_by_parameter(one):
            tensors = {name: value for name, value in states.items() if torch.is_tensor(value)}
            if param.dtype != torch.float32:
                tensors["fp32_param"] = main
            is_spread = isinstance(one, DistributedOptimizer)
            for name, values in tensors.items():
                yield name, param, values.detach().reshape(-1), begin, is_spread


def _states_by_parameter(
    optimizer: Any,
) -> Iterator[tuple[torch.nn.Parameter, Tensor, int, Mapping[str, Any]]]:
    if isinstance(optimizer, DistributedOptimizer):
        for param in optimizer.model_param_group_index_map:
            states = optimizer._get_main_param_and_optimizer_states(param)
            begin = optimizer._get_model_param_range_map(param)["param"].start
            yield param, states.pop("param"), begin, states
        return
    if isinstance(optimizer, FP32Optimizer):
        pairs: Iterable[Any] = ((param, param) for param in optimizer.get_parameters())
    else:
        groups = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        low = [pair for models, mains in groups for pair in zip(models, mains, strict=True)]
        full = [(param, param) for group in optimizer.fp32_from_fp32_groups for param in group]
        pairs = [*low, *full]
    for param, main in pairs:
        yield param, main, 0, optimizer.optimizer.state.get(main, {})


def _overlap(part: _Part, *, begin: int, size: int) -> int:
    return max(0, min(begin + size, part.first + part.size) - max(begin, part.first))


def hash_box(values: Tensor, part: _Part, *, begin: int) -> int:
    """The hash of the elements of `part` in `values` [n], a run of the flattened parameter from `begin` on."""
    start, stop = max(begin, part.first), min(begin + values.numel(), part.first + part.size)
    if stop <= start:
        return 0
    bits = values[start - begin : stop - begin].contiguous().view(_BITS[values.element_size()])
    step = _CHUNK["cuda" if values.is_cuda else "cpu"]
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for low in range(0, bits.numel(), step):
        chunk = bits[low : low + step].to(torch.int64)
        place = start - part.first + low
        index = torch.arange(place, place + chunk.numel(), device=values.device)
        total += _mix(_canonical(index, part).mul_(_GOLDEN).add_(chunk)).sum()
    return int(total.item()) % _MODULUS


def _canonical(index: Tensor, part: _Part) -> Tensor:
    """Places in the flattened canonical tensor for places in the flattened box, [n] int64."""
    strides = [math.prod(part.whole[axis + 1 :]) for axis in range(len(part.whole))]
    base = sum(o * stride for o, stride in zip(part.offset, strides, strict=True))
    cut = next((axis for axis, size in enumerate(part.shape) if size > 1), 0)
    if part.shape[cut + 1 :] == part.whole[cut + 1 :]:
        return index.add_(base)
    place = torch.full_like(index, base)
    for axis in reversed(range(len(part.shape))):
        place.add_(index % part.shape[axis], alpha=strides[axis])
        index = index.div(part.shape[axis], rounding_mode="floor")
    return place


def _mix(number: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, in place; a shift of a signed number needs its copies of the sign cut off."""
    for shift, factor in _ROUNDS:
        number.bitwise_xor_((number >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            number.mul_(factor)
    return number


def differing(found: Mapping[str, TensorHash], expected: Mapping[str, TensorHash]) -> list[str]:
    """Names of tensors that differ, or are on one side only."""
    names = defaultdict(list, {name: [hash_] for name, hash_ in found.items()})
    for name, hash_ in expected.items():
        names[name].append(hash_)
    return sorted(name for name, pair in names.items() if len(pair) < 2 or pair[0] != pair[1])
