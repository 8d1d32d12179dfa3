# SPDX-License-Identifier: Apache-2.0
"""Zigzag over context-parallel ranks: every token once, equal shares of every sample and of its causal attention."""

import pytest
import torch

from megatron_eve.model.zigzag import Chunk, zigzag_chunks, zigzag_positions

LENGTHS = (16, 8, 24, 8)


def test_two_ranks_by_hand() -> None:
    """A sample of 8 in 4 chunks of 2: rank 0 holds the first and the last, rank 1 the two between."""
    assert zigzag_chunks([8], cp_rank=0, cp_size=2) == [Chunk(0, 0, 2), Chunk(0, 6, 2)]
    assert zigzag_chunks([8], cp_rank=1, cp_size=2) == [Chunk(0, 2, 2), Chunk(0, 4, 2)]
    second = zigzag_chunks([8, 4], cp_rank=1, cp_size=2)[2:]
    assert second == [Chunk(8, 9, 1), Chunk(8, 10, 1)]
    assert zigzag_positions([8, 4], cp_rank=0, cp_size=2).tolist() == [0, 1, 6, 7, 8, 11]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_every_token_is_on_one_rank(cp_size: int) -> None:
    held = [zigzag_positions(LENGTHS, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    assert {positions.numel() for positions in held} == {sum(LENGTHS) // cp_size}
    assert torch.equal(torch.cat(held).sort().values, torch.arange(sum(LENGTHS)))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_causal_attention_costs_every_rank_the_same(cp_size: int) -> None:
    """Query at position i of its sample sees i + 1 keys; summed over a rank's queries, for each sample by itself."""
    start = 0
    for length in LENGTHS:
        costs = set()
        for rank in range(cp_size):
            positions = zigzag_positions(LENGTHS, cp_rank=rank, cp_size=cp_size)
            mine = positions[(positions >= start) & (positions < start + length)] - start
            costs.add(int((mine + 1).sum()))
        assert costs == {length * (length + 1) // 2 // cp_size}
        start += length


def test_one_rank_holds_whole_samples_of_any_length() -> None:
    assert zigzag_chunks([3, 5], cp_rank=0, cp_size=1) == [Chunk(0, 0, 3), Chunk(3, 3, 5)]


def test_a_sample_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample has 6 tokens, no multiple of 4"):
        zigzag_chunks([8, 6], cp_rank=0, cp_size=2)
