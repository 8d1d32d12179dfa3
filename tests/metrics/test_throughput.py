# SPDX-License-Identifier: Apache-2.0
"""Counts of steps, their reduction over real processes, and the rates made from them."""

from typing import Any

import pytest
import torch

from megatron_eve.data.sample import Pack
from megatron_eve.metrics.definitions import METRICS
from megatron_eve.metrics.reduction import reduce_over_ranks
from megatron_eve.metrics.throughput import StepMeter, rates


def make_pack(*, vision: int, text: int, size: int, samples: int, bad: int = 0) -> Pack:
    empty = torch.zeros(0, dtype=torch.int64)
    return Pack(
        num_vision=size // 2,
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        max_seqlen=size,
        position_ids=torch.arange(size),
        modality_order=torch.arange(size),
        text_ids=torch.zeros(size - size // 2, dtype=torch.int64),
        vision_kind=torch.zeros(size // 2, dtype=torch.uint8),
        patches=None,
        label_rows=empty,
        label_targets=torch.zeros(text, dtype=torch.int64) if samples else empty,
        sample_ids=tuple(str(i) for i in range(samples)),
        num_real_vision=vision,
        num_real_text=text,
        quarantined=tuple((str(i), "truncated") for i in range(bad)),
    )


def test_counts_are_averages_per_step_and_start_anew() -> None:
    meter = StepMeter()
    full = make_pack(vision=30, text=20, size=64, samples=3, bad=1)
    filler = make_pack(vision=0, text=0, size=64, samples=0)
    meter.add_step([full, full], step_time_s=2.0, data_wait_s=0.5)
    meter.add_step([full, filler], step_time_s=4.0, data_wait_s=0.1)
    assert meter.take() == {
        "samples": 4.5,
        "packs": 1.5,
        "vision_tokens": 45.0,
        "text_tokens": 30.0,
        "label_tokens": 30.0,
        "computed_tokens": 128.0,
        "quarantined": 1.5,
        "step_time_s": 3.0,
        "data_wait_s": 0.3,
    }
    meter.add_step([filler], step_time_s=1.0, data_wait_s=0.0)
    assert meter.take()["samples"] == 0


def test_taking_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no step was added"):
        StepMeter().take()


def test_every_count_and_rate_is_declared() -> None:
    meter = StepMeter()
    meter.add_step([make_pack(vision=3, text=5, size=16, samples=1)], step_time_s=2, data_wait_s=1)
    counts = meter.take()
    found = rates(counts, world_size=2, steps_left=10)
    assert found == {
        "tokens_per_s_per_gpu": 2.0,
        "fill": 0.5,
        "data_wait_fraction": 0.5,
        "eta_s": 20.0,
    }
    assert set(counts) | set(found) <= set(METRICS)
    assert all(METRICS[name].reduction == "same" for name in found)
    assert all(METRICS[name].reduction != "same" for name in counts)


def reduce_on_rank() -> dict[str, float]:
    rank = torch.distributed.get_rank()
    values = {"loss": 7.0, "samples": 2.0**40 + rank, "step_time_s": 1.0 + rank, "text_tokens": 3.0}
    group = torch.distributed.group.WORLD
    assert group is not None
    return reduce_over_ranks(values, group=group, device=torch.device("cpu"))


def test_reduction_follows_the_declaration_on_every_rank(gloo2: Any) -> None:
    expected = {"loss": 7.0, "samples": 2.0**41 + 1, "step_time_s": 2.0, "text_tokens": 6.0}
    for found in gloo2.run(reduce_on_rank):
        assert found == expected
        assert list(found) == list(expected)
