# SPDX-License-Identifier: Apache-2.0
"""How long a demonstration took and how fast its stages trained, from the records of its steps and the metrics.jsonl
of its runs. Seconds are those of the commands: installation and downloads are not among them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eve.errors import DataError
from megatron_eve.evaluation.scoring import aligned
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import METRICS_FILE
from megatron_eve.whole import write_json
from tools.demo.pipelines import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpeed:
    """One training run in numbers."""

    name: str
    steps: int
    last_loss: float
    step_time_s: float  # mean
    tokens_per_s: float  # of all processes, padding not counted
    fill: float  # mean of the logged steps


def stage_speed(stage: Stage) -> StageSpeed:
    """Means over a run; a record's times count for all steps since the record before. Raises: DataError."""
    path = stage.run_dir / METRICS_FILE
    records = read_metrics(path)
    if not records:
        raise DataError(f"{path} holds no record; the run logged no step.")
    before, seconds, tokens = 0.0, 0.0, 0.0
    for record in records:
        elapsed = (_number(record, "step") - before) * _number(record, "step_time_s")
        seconds += elapsed
        tokens += elapsed * _number(record, "tokens_per_s_per_gpu")
        before = _number(record, "step")
    return StageSpeed(
        name=stage.name,
        steps=int(before),
        last_loss=_number(records[-1], "loss"),
        step_time_s=seconds / before,
        tokens_per_s=stage.config.parallel.world_size * tokens / seconds,
        fill=sum(_number(record, "fill") for record in records) / len(records),
    )


def summarise(seconds: Mapping[str, float], stages: Sequence[Stage], *, out: Path) -> list[str]:
    """Write summary.json and summary.md; returns the lines to print."""
    speeds = [stage_speed(stage) for stage in stages]
    total = sum(seconds.values())
    times = [(name, f"{value:.0f}") for name, value in seconds.items()]
    cells = [
        (
            speed.name,
            f"{speed.steps:,}",
            f"{speed.last_loss:.4f}",
            f"{1000 * speed.step_time_s:.0f} ms",
            f"{speed.tokens_per_s:,.0f}",
            f"{speed.fill:.1%}",
        )
        for speed in speeds
    ]
    lines = [
        *aligned(("step", "seconds"), [*times, ("all", f"{total:.0f}")]),
        "",
        *aligned(("training run", "steps", "last loss", "step time", "tokens/s", "fill"), cells),
    ]
    stage_numbers = [asdict(speed) for speed in speeds]
    write_json(
        out / "summary.json",
        {"seconds": dict(seconds), "total_seconds": round(total, 1), "stages": stage_numbers},
    )
    (out / "summary.md").write_text("\n".join(["# Times and speeds", "", *lines, ""]))
    return lines


def _number(record: Mapping[str, float | None], name: str) -> float:
    value = record.get(name)
    if value is None:
        return float("nan")
    return value
