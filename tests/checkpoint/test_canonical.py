# SPDX-License-Identifier: Apache-2.0
"""The hash of a canonical tensor: the same however it is cut, another one for any other content."""

import itertools
import random

import pytest
import torch

from megatron_eve.checkpoint import canonical
from megatron_eve.checkpoint.canonical import TensorHash, _Part, differing, hash_box

SHAPE = (3, 6, 10)
MODULUS = 1 << 64


def part(shape: tuple[int, ...], offset: tuple[int, ...], first: int = 0) -> _Part:
    return _Part("w", first, shape, offset, SHAPE, (0,))


def whole(tensor: torch.Tensor) -> int:
    return hash_box(tensor.reshape(-1), part(SHAPE, (0, 0, 0)), begin=0)


def plain(tensor: torch.Tensor) -> int:
    """The docstring's formula with Python's own integers."""
    total = 0
    for index, bits in enumerate(tensor.view(torch.int32).reshape(-1).tolist()):
        number = (index * 0x9E3779B97F4A7C15 + bits) % MODULUS
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) % MODULUS
        total += number ^ (number >> 31)
    return total % MODULUS


@pytest.fixture
def tensor() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_equals_the_formula(tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert whole(tensor) == plain(tensor)
    monkeypatch.setitem(canonical._CHUNK, "cpu", 7)
    assert whole(tensor) == plain(tensor)


def test_any_cut_gives_the_same(tensor: torch.Tensor) -> None:
    """Into boxes along every axis, as tensor and pipeline parallelism do, and each into runs, as data parallelism."""
    draw = random.Random(2)
    cuts = [sorted({0, size, draw.randrange(1, size)}) for size in SHAPE]
    boxes = itertools.product(*(itertools.pairwise(cut) for cut in cuts))
    total = 0
    for box in boxes:
        local = tensor[tuple(slice(*side) for side in box)].contiguous()
        place = part(tuple(local.shape), tuple(low for low, _ in box), first=5)
        flat = torch.cat([torch.full((5,), 9.0), local.reshape(-1)])  # other elements before it
        middle = draw.randrange(0, flat.numel())
        total += hash_box(flat[:middle], place, begin=0) + hash_box(
            flat[middle:], place, begin=middle
        )
    assert total % MODULUS == whole(tensor)


def test_any_change_is_noticed(tensor: torch.Tensor) -> None:
    seen = {whole(tensor)}
    for index, bit in itertools.product((0, 77, 179), (0, 9, 22, 23, 30, 31)):
        other = tensor.clone()
        other.view(torch.int32).reshape(-1)[index] ^= torch.tensor(1 << bit).to(torch.int32)
        seen.add(whole(other))
    assert len(seen) == 1 + 3 * 6
    swapped = tensor.clone()
    swapped[0, 0, 0], swapped[2, 5, 9] = tensor[2, 5, 9], tensor[0, 0, 0]
    seen |= {whole(swapped), whole(tensor.roll(1)), whole(torch.zeros(SHAPE))}
    seen |= {whole(-torch.zeros(SHAPE)), whole(tensor.double()), whole(tensor.bfloat16())}
    assert len(seen) == 1 + 3 * 6 + 6


def test_differing_names() -> None:
    one, other = TensorHash(1, (2,), "float32"), TensorHash(2, (2,), "float32")
    assert differing({"a": one, "b": one, "c": one}, {"a": one, "b": other, "d": one}) == [
        "b",
        "c",
        "d",
    ]
    assert TensorHash.from_json(other.as_json()) == other
