# SPDX-License-Identifier: Apache-2.0
"""Shared by all benchmarks: hardware, interleaved repeats, a JSON file that is kept, a Markdown table.

Interleaved: in each round every contender runs once, in an order that rotates, so that a machine that slows down slows
all of them. A ratio is taken inside each round; what is reported is the median over rounds. CPU time
of the process stands beside wall time: on a machine that others use too it moves less."""

import argparse
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_eve import device
from megatron_eve.command import reports_errors
from megatron_eve.errors import ConfigError, EveError
from megatron_eve.whole import write_json


class BenchmarkError(EveError):
    """A benchmark cannot be run as asked, or its contenders do not compute the same."""


def hardware() -> dict[str, Any]:
    """The machine, and how busy it was when the benchmark ended."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_1min_at_end": round(os.getloadavg()[0], 2),
    }
    if device.has_gpu():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Seconds:
    """Times of one contender, round by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # of all threads of this process

    def as_json(self) -> dict[str, list[float]]:
        return {"wall": [round(s, 4) for s in self.wall], "cpu": [round(s, 4) for s in self.cpu]}


def interleaved_seconds(
    contenders: Mapping[str, Callable[[int], object]], *, rounds: int, warm_up: int
) -> dict[str, Seconds]:
    """Seconds of each contender in each round. A contender is called with the number of the round, counted from 0 with
    the warm-up rounds, which are not reported."""
    names = list(contenders)
    seconds = {name: Seconds() for name in names}
    for number in range(warm_up + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _finish_device_work()
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name](number)
            _finish_device_work()
            if number >= warm_up:
                seconds[name].wall.append(time.perf_counter() - wall)
                seconds[name].cpu.append(time.process_time() - cpu)
    return seconds


def _finish_device_work() -> None:
    if device.has_gpu():
        torch.cuda.synchronize()


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over rounds of the ratio inside a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """The rows, whose keys are the columns, as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def add_output_options(parser: argparse.ArgumentParser, *, name: str) -> None:
    """--out and --overwrite, which say where `run_benchmark` writes."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help=f"for {name}.json (runs/bench)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help=f"replace {name}.json if it exists"
    )


@reports_errors
def run_benchmark(
    options: argparse.Namespace,
    *,
    name: str,
    measure: Callable[[], Sequence[Any]],
    table: Callable[[Sequence[Any]], str],
) -> int:
    """Measure, keep the rows with their settings in DIR/name.json, print the table.

    An older result is refused before anything is measured, unless --overwrite was given. Exit status: 0 measured and
    written, 1 not, 2 there is an older result."""
    path = options.out / f"{name}.json"
    if path.exists() and not options.overwrite:
        raise ConfigError(f"{path} exists; add --overwrite to replace it or choose another --out.")
    rows = measure()
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "overwrite")}
    _write_result(path, settings=settings, rows=rows)
    print(table(rows))
    print(f"\n{name} benchmark written to {path}")
    return 0


def _write_result(path: Path, *, settings: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """One JSON file: benchmark, date, hardware, settings, rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": path.stem,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "settings": dict(settings),
        "rows": list(rows),
    }
    write_json(path, result)
