# SPDX-License-Identifier: Apache-2.0
"""The parts of a pack that the ranks compute on, put together again, are the pack. Index arithmetic, no processes."""

import itertools
from typing import Any

import pytest
import torch

from megatron_eve.data.sample import VISION_PATCH, Pack
from megatron_eve.model.micro_batch import MicroBatch, RankPlace, micro_batch, stream_rows
from tests.support.tiny import naive_pack, random_samples, tiny_model

MODEL, TOKENS, ALIGN = tiny_model(), 160, 8


def pack_of(seed: int, *, count: int = 5) -> Pack:
    samples = random_samples(count, seed=seed)
    return naive_pack(samples, model=MODEL, tokens=TOKENS, align=ALIGN, sample_align=8)


def part(pack: Pack, *, label_weights: torch.Tensor | None = None, **place: Any) -> MicroBatch:
    return micro_batch(
        pack,
        place=RankPlace(**place),
        split_attention=True,
        align=ALIGN,
        device=torch.device("cpu"),
        label_weights=label_weights,
    )


def places(tp_size: int, cp_size: int, sequence_parallel: bool) -> list[list[dict[str, Any]]]:
    """Places by context-parallel rank, then tensor-parallel rank."""
    fixed = dict(tp_size=tp_size, cp_size=cp_size, sequence_parallel=sequence_parallel)
    return [
        [dict(tp_rank=tp, cp_rank=cp, **fixed) for tp in range(tp_size)] for cp in range(cp_size)
    ]


@pytest.mark.parametrize("cp_size", [2, 4])
@pytest.mark.parametrize("count", [5, 1, 0])
def test_context_ranks_share_a_pack(cp_size: int, count: int) -> None:
    """Every token, label and patch is on one rank; every rank has the same number of rows, whatever the pack holds."""
    pack = pack_of(3, count=count)
    batches = [part(pack, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    rows = {batch.routing.to_rows.numel() for batch in batches}
    assert rows == {stream_rows(TOKENS, cp_size=cp_size, align=ALIGN)}
    positions = torch.cat([batch.position_ids for batch in batches])
    assert torch.equal(positions.sort().values, pack.position_ids.sort().values)
    targets = torch.cat([batch.label_targets[: batch.num_labels] for batch in batches])
    assert torch.equal(targets.sort().values, pack.label_targets.sort().values)
    weights = torch.cat([batch.label_weights for batch in batches])
    assert weights.tolist().count(1) == pack.label_targets.numel()
    assert set(weights.tolist()) <= {0.0, 1.0}, "a target weighs 1, a padding row nothing"
    assert pack.patches is not None
    assert sum(len(batch.patches) for batch in batches) == len(pack.patches)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_each_label_keeps_its_weight(cp_size: int) -> None:
    """However a pack is cut, (target, weight) pairs are those of the pack."""
    pack = pack_of(3)
    weights = torch.arange(1.0, 1 + pack.label_targets.numel())
    found = []
    for rank in range(cp_size):
        batch = part(pack, cp_rank=rank, cp_size=cp_size, label_weights=weights)
        count = batch.num_labels
        found += zip(
            batch.label_targets[:count].tolist(), batch.label_weights[:count].tolist(), strict=True
        )
        assert not batch.label_weights[count:].any()
    assert sorted(found) == sorted(zip(pack.label_targets.tolist(), weights.tolist(), strict=True))


@pytest.mark.parametrize(("tp_size", "cp_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rows_hold_the_tokens_that_the_routing_says(
    tp_size: int, cp_size: int, sequence_parallel: bool
) -> None:
    """to_sequence and to_rows are inverses; rows without a token are padding of either segment."""
    if sequence_parallel and tp_size == 1:
        pytest.skip("needs tensor parallelism")
    pack = pack_of(4)
    for place in itertools.chain(*places(tp_size, cp_size, sequence_parallel)):
        routing = part(pack, **place).routing
        num_tokens = routing.to_sequence.numel()
        assert num_tokens == TOKENS // cp_size
        assert torch.equal(routing.to_rows[routing.to_sequence], torch.arange(num_tokens))
        empty = routing.to_rows == num_tokens
        assert int(empty.sum()) == routing.to_rows.numel() - num_tokens
        assert routing.has_rows_without_token == (cp_size > 1)
        assert routing.num_vision % ALIGN == 0
        shards = tp_size if sequence_parallel else 1
        assert routing.num_local_vision == routing.num_vision // shards


@pytest.mark.parametrize("cp_size", [2, 4])
def test_gathered_keys_come_in_the_order_of_the_pack(cp_size: int) -> None:
    """from_gathered undoes the ranks' zigzag: it is applied to the positions that each rank holds."""
    pack = pack_of(5)
    batches = [part(pack, cp_rank=rank, cp_size=cp_size) for rank in range(cp_size)]
    gathered = torch.cat([batch.position_ids for batch in batches])
    for batch in batches:
        assert batch.routing.from_gathered is not None
        assert torch.equal(gathered[batch.routing.from_gathered], pack.position_ids)


@pytest.mark.parametrize(("tp_size", "cp_size"), [(2, 1), (2, 2), (1, 2)])
def test_pixels_are_those_of_the_rows(tp_size: int, cp_size: int) -> None:
    """Over all shards: each patch of the pack once, in the order of the rank's vision rows."""
    pack = pack_of(6)
    assert pack.patches is not None
    found = []
    for shards in places(tp_size, cp_size, tp_size > 1):
        batches = [part(pack, **place) for place in shards]
        for batch in batches:
            is_patch = batch.vision_sources < len(batch.patches)
            assert torch.equal(batch.vision_sources[is_patch], torch.arange(len(batch.patches)))
        found.append(torch.cat([batch.patches for batch in batches]))
    together = torch.cat(found).flatten(1)
    assert int((pack.vision_kind == VISION_PATCH).sum()) == len(together)
    by_bytes = [sorted(map(bytes, rows.numpy())) for rows in (together, pack.patches.flatten(1))]
    assert by_bytes[0] == by_bytes[1]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_kept_rows_are_the_labelled_ones(sequence_parallel: bool, cp_size: int) -> None:
    """The last layer's output, gathered over the shards, has at label_rows the token whose next one is the target."""
    pack = pack_of(7)
    target_of = dict(
        zip(pack.modality_order[pack.label_rows].tolist(), pack.label_targets.tolist(), strict=True)
    )
    seen = {}
    for shards in places(2, cp_size, sequence_parallel):
        batches = [part(pack, **place) for place in shards]
        for batch in batches:
            kept, routing = batch.routing.kept, batch.routing
            assert kept is not None
            assert kept.residual.numel() <= routing.to_rows.numel()
        # what each rank's residual stream holds: position in the pack, -1 where no token is
        streams = [_positions_of_stream(pack, place) for place in shards]
        gathered = torch.cat(
            [
                torch.cat([stream, torch.tensor([-1])])[batch.routing.kept.residual]  # type: ignore[union-attr]
                for stream, batch in zip(
                    streams if sequence_parallel else streams[:1], batches, strict=False
                )
            ]
        )
        batch = batches[0]
        for row, target in zip(
            batch.label_rows[: batch.num_labels].tolist(),
            batch.label_targets[: batch.num_labels].tolist(),
            strict=True,
        ):
            seen[int(gathered[row])] = target
    assert seen == target_of


def _positions_of_stream(pack: Pack, place: dict[str, Any]) -> torch.Tensor:
    """[rows of this rank's residual stream] position in the pack, or -1: naively, from the definition of the orders."""
    from megatron_eve.model.zigzag import zigzag_positions

    lengths = pack.cu_seqlens.diff().tolist()
    held = set(
        zigzag_positions(lengths, cp_rank=place["cp_rank"], cp_size=place["cp_size"]).tolist()
    )
    vision = [p for p in pack.modality_order[: pack.num_vision].tolist() if p in held]
    text = [p for p in pack.modality_order[pack.num_vision :].tolist() if p in held]
    total = stream_rows(TOKENS, cp_size=place["cp_size"], align=ALIGN)
    num_vision = max(ALIGN, -(-len(vision) // ALIGN) * ALIGN)
    vision += [-1] * (num_vision - len(vision))
    text += [-1] * (total - num_vision - len(text))
    shards = place["tp_size"] if place["sequence_parallel"] else 1
    shard = place["tp_rank"] if place["sequence_parallel"] else 0
    return torch.cat(
        [torch.tensor(vision).chunk(shards)[shard], torch.tensor(text).chunk(shards)[shard]]
    )
