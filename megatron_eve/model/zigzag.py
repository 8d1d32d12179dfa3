# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a pack a context-parallel rank holds: zigzag, per sample.

A sample of n tokens (a multiple of 2 * cp) is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r, an
early one with little to look back on and a late one, so that causal attention costs every rank the same. It is the
partition that Transformer Engine's attention expects of packed (`thd`) input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive tokens of one sample. Positions in the whole pack's sequence order."""

    sample_start: int  # first token of the sample
    start: int  # first token of the chunk
    size: int


def zigzag_chunks(lengths: Sequence[int], *, cp_rank: int, cp_size: int) -> list[Chunk]:
    """The chunks of rank `cp_rank`, in the order in which it holds them. With one rank: whole samples.

    Raises: ValueError if a length is no multiple of 2 * cp_size.
    """
    chunks, sample_start = [], 0
    for length in lengths:
        if cp_size == 1:
            chunks.append(Chunk(sample_start, sample_start, length))
        else:
            size, rest = divmod(length, 2 * cp_size)
            if rest:
                raise ValueError(f"a sample has {length} tokens, no multiple of {2 * cp_size}")
            for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
                chunks.append(Chunk(sample_start, sample_start + number * size, size))
        sample_start += length
    return chunks


def zigzag_positions(lengths: Sequence[int], *, cp_rank: int, cp_size: int) -> Tensor:
    """[sum(lengths) / cp_size] int64: position in the whole pack of each token of rank `cp_rank`."""
    chunks = zigzag_chunks(lengths, cp_rank=cp_rank, cp_size=cp_size)
    return torch.cat([torch.arange(chunk.start, chunk.start + chunk.size) for chunk in chunks])
