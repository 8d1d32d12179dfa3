# SPDX-License-Identifier: Apache-2.0
"""Gathers the values of each step and makes one record of those since the last record, with the rates that follow.

    meter.add({"loss": ..., "vision_tokens": ..., "step_time_s": ..., ...})            every step
    sinks.log(step, meter.take(world_size=..., steps_left=..., peak_flops=...))          every logged step

definitions.py decides how steps become one value. Plain arithmetic on the host: no device, no collective."""

from collections.abc import Mapping

from megatron_eve.metrics.definitions import METRICS

NEEDED = (
    "vision_tokens",
    "text_tokens",
    "computed_tokens",
    "ideal_flops",
    "executed_flops",
    "step_time_s",
    "data_wait_s",
)
"""Values of every step, from which the rates are made; `step_time_s` includes `data_wait_s`."""


class StepMeter:
    """The values of the steps since the last record."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []

    def add(self, values: Mapping[str, float]) -> None:
        """Count one step. The names are declared ones, the same in every step, with all of NEEDED among them."""
        assert set(NEEDED) <= set(values) <= set(METRICS), f"values of a step are {sorted(values)}"
        self._steps.append(dict(values))

    def take(
        self, *, world_size: int, steps_left: int, peak_flops: float | None
    ) -> dict[str, float]:
        """One record of the steps since the last call, by the reduction of each metric; starts anew. `peak_flops`:
        FLOP/s of one process' device; None, if unknown, leaves the utilisations out."""
        assert self._steps, "no step was added since the last record"
        steps, self._steps = self._steps, []
        record = {name: _reduce(name, [step[name] for step in steps]) for name in steps[0]}
        speeds = _speeds(steps, world_size=world_size, peak_flops=peak_flops)
        return record | _rates(steps, world_size=world_size, steps_left=steps_left) | speeds


def _reduce(name: str, values: list[float]) -> float:
    match METRICS[name].reduction:
        case "last":
            return values[-1]
        case "mean":
            return sum(values) / len(values)
        case "max":
            return max(values)
        case "sum":
            return sum(values)


def _rates(steps: list[dict[str, float]], *, world_size: int, steps_left: int) -> dict[str, float]:
    seconds = sum(step["step_time_s"] for step in steps)
    useful = [step["vision_tokens"] + step["text_tokens"] for step in steps]
    return {
        "fill": useful[-1] / steps[-1]["computed_tokens"],
        "data_wait_fraction": sum(step["data_wait_s"] for step in steps) / seconds,
        "tokens_per_s_per_gpu": sum(useful) / seconds / world_size,
        "eta_s": steps_left * seconds / len(steps),
    }


def _speeds(
    steps: list[dict[str, float]], *, world_size: int, peak_flops: float | None
) -> dict[str, float]:
    process_seconds = sum(step["step_time_s"] for step in steps) * world_size
    useful = sum(step["ideal_flops"] for step in steps) / process_seconds
    executed = sum(step["executed_flops"] for step in steps) / process_seconds
    speeds = {"useful_tflops_per_gpu": useful / 1e12, "executed_tflops_per_gpu": executed / 1e12}
    if peak_flops is None:
        return speeds
    return speeds | {"mfu": useful / peak_flops, "hardware_utilization": executed / peak_flops}
