# SPDX-License-Identifier: Apache-2.0
"""Steps become a record by the declared reductions, and the rates follow from sums, not from means of ratios."""

import pytest

from megatron_eve.metrics.definitions import METRICS
from megatron_eve.metrics.throughput import NEEDED, StepMeter


def step_values(**values: float) -> dict[str, float]:
    base = {"vision_tokens": 300.0, "text_tokens": 100.0, "computed_tokens": 512.0}
    return base | {"step_time_s": 1.0, "data_wait_s": 0.0} | values


def test_record_of_two_steps() -> None:
    meter = StepMeter()
    meter.add(step_values(loss=3.0, lr=1e-3, memory_gib=9.0, quarantined=2.0, data_wait_s=0.5))
    meter.add(
        step_values(loss=2.0, lr=2e-3, memory_gib=7.0, quarantined=1.0, step_time_s=3.0)
        | {"vision_tokens": 700.0, "computed_tokens": 1024.0}
    )
    assert meter.take(world_size=2, steps_left=10) == {
        "loss": 2.0,
        "lr": 2e-3,
        "memory_gib": 9.0,
        "quarantined": 3.0,
        "vision_tokens": 700.0,
        "text_tokens": 100.0,
        "computed_tokens": 1024.0,
        "step_time_s": 2.0,
        "data_wait_s": 0.25,
        "fill": 800 / 1024,
        "data_wait_fraction": 0.5 / 4,
        "tokens_per_s_per_gpu": 1200 / 4 / 2,
        "eta_s": 20.0,
    }


def test_a_record_starts_anew() -> None:
    meter = StepMeter()
    meter.add(step_values(step_time_s=100.0))
    meter.take(world_size=1, steps_left=0)
    meter.add(step_values())
    assert meter.take(world_size=1, steps_left=3)["eta_s"] == 3.0


def test_what_a_step_computes_does_not_depend_on_where_a_run_was_resumed() -> None:
    whole, resumed = StepMeter(), StepMeter()
    for loss in (5.0, 4.0, 3.0):
        whole.add(step_values(loss=loss, grad_norm=loss / 2))
    resumed.add(step_values(loss=3.0, grad_norm=1.5))
    first, second = (meter.take(world_size=1, steps_left=0) for meter in (whole, resumed))
    for name in ("loss", "grad_norm", "fill", "vision_tokens"):
        assert first[name] == second[name]


def test_record_without_a_step_is_refused() -> None:
    with pytest.raises(AssertionError, match="no step was added"):
        StepMeter().take(world_size=1, steps_left=1)


@pytest.mark.parametrize("name", NEEDED)
def test_step_without_what_the_rates_need_is_refused(name: str) -> None:
    values = step_values()
    del values[name]
    with pytest.raises(AssertionError, match="values of a step are"):
        StepMeter().add(values)


def test_undeclared_value_is_refused() -> None:
    with pytest.raises(AssertionError, match="los"):
        StepMeter().add(step_values(los=1.0))


def test_declarations_are_complete() -> None:
    meter = StepMeter()
    meter.add(step_values())
    assert set(meter.take(world_size=1, steps_left=1)) <= set(METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
    assert len(METRICS) == len({metric.meaning for metric in METRICS.values()})
