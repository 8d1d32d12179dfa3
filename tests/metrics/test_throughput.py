# SPDX-License-Identifier: Apache-2.0
"""Steps become a record by the declared reductions, and the rates follow from sums, not from means of ratios."""

import pytest

from megatron_eve.metrics.definitions import METRICS
from megatron_eve.metrics.throughput import NEEDED, StepMeter


def step_values(**values: float) -> dict[str, float]:
    base = {"vision_tokens": 300.0, "text_tokens": 100.0, "computed_tokens": 512.0}
    base |= {"ideal_flops": 8e12, "executed_flops": 10e12}
    return base | {"step_time_s": 1.0, "data_wait_s": 0.0} | values


def test_record_of_two_steps() -> None:
    meter = StepMeter()
    meter.add(step_values(loss=3.0, lr=1e-3, memory_gib=9.0, quarantined=2.0, data_wait_s=0.5))
    meter.add(
        step_values(loss=2.0, lr=2e-3, memory_gib=7.0, quarantined=1.0, step_time_s=3.0)
        | {"vision_tokens": 700.0, "computed_tokens": 1024.0}
        | {"ideal_flops": 16e12, "executed_flops": 18e12}
    )
    assert meter.take(world_size=2, steps_left=10, peak_flops=None) == {
        "loss": 2.0,
        "lr": 2e-3,
        "memory_gib": 9.0,
        "quarantined": 3.0,
        "vision_tokens": 700.0,
        "text_tokens": 100.0,
        "computed_tokens": 1024.0,
        "ideal_flops": 16e12,
        "executed_flops": 18e12,
        "step_time_s": 2.0,
        "data_wait_s": 0.25,
        "fill": 800 / 1024,
        "data_wait_fraction": 0.5 / 4,
        "tokens_per_s_per_gpu": 1200 / 4 / 2,
        "useful_tflops_per_gpu": 24 / 4 / 2,
        "executed_tflops_per_gpu": 28 / 4 / 2,
        "eta_s": 20.0,
    }


def test_utilisation_is_of_the_peak_of_all_devices() -> None:
    meter = StepMeter()
    meter.add(step_values(step_time_s=0.5))
    meter.add(step_values(step_time_s=1.5, ideal_flops=24e12))
    record = meter.take(world_size=4, steps_left=0, peak_flops=20e12)
    assert record["mfu"] == (8 + 24) / 2 / 4 / 20
    assert record["hardware_utilization"] == (10 + 10) / 2 / 4 / 20


def test_without_a_peak_no_utilisation_is_shown() -> None:
    meter = StepMeter()
    meter.add(step_values())
    record = meter.take(world_size=1, steps_left=0, peak_flops=None)
    assert {"mfu", "hardware_utilization"}.isdisjoint(record)
    assert record["useful_tflops_per_gpu"] == 8.0


def test_a_record_starts_anew() -> None:
    meter = StepMeter()
    meter.add(step_values(step_time_s=100.0))
    meter.take(world_size=1, steps_left=0, peak_flops=None)
    meter.add(step_values())
    assert meter.take(world_size=1, steps_left=3, peak_flops=None)["eta_s"] == 3.0


def test_what_a_step_computes_does_not_depend_on_where_a_run_was_resumed() -> None:
    whole, resumed = StepMeter(), StepMeter()
    for loss in (5.0, 4.0, 3.0):
        whole.add(step_values(loss=loss, grad_norm=loss / 2))
    resumed.add(step_values(loss=3.0, grad_norm=1.5))
    first, second = (
        meter.take(world_size=1, steps_left=0, peak_flops=None) for meter in (whole, resumed)
    )
    for name in ("loss", "grad_norm", "fill", "vision_tokens"):
        assert first[name] == second[name]


def test_record_without_a_step_is_refused() -> None:
    with pytest.raises(AssertionError, match="no step was added"):
        StepMeter().take(world_size=1, steps_left=1, peak_flops=None)


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
    assert set(meter.take(world_size=1, steps_left=1, peak_flops=989e12)) <= set(METRICS)
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
    assert len(METRICS) == len({metric.meaning for metric in METRICS.values()})
