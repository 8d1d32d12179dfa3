# SPDX-License-Identifier: Apache-2.0
"""Curves of one or several runs from their metrics.jsonl: loss, gradient norm, learning rate and pack fill.

Runs are drawn one after another along the x axis, in the order given, as the stages of a curriculum follow each other:
each starts where the one before ended. A thin line is every logged step, the thick one its running mean (loss only).

    python -m tools.plot runs/eve_tiny_stage1 runs/eve_tiny_stage2_1 --out curves.png"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, DataError
from megatron_eve.metrics.definitions import METRICS
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import METRICS_FILE

PANELS = ("loss", "grad_norm", "lr", "fill")
_LOG_SCALE = ("grad_norm",)
_SMOOTHED = "loss"
_SMOOTHING_SHARE = 20  # the running mean spans this part of a run's records


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The records of one run, and where it begins on the common x axis."""

    name: str
    first_step: int
    records: list[dict[str, float | None]]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps on the common axis and values, where the metric was logged and finite."""
        points = [(row["step"], row.get(metric)) for row in self.records]
        known = [(step, value) for step, value in points if step is not None and value is not None]
        return [self.first_step + step for step, _ in known], [value for _, value in known]


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs, each moved behind the one before.

    Raises: DataError if a folder has no metrics.jsonl or an empty one.
    """
    runs: list[Run] = []
    end = 0
    for run_dir in run_dirs:
        path = run_dir / METRICS_FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist; name run folders that training wrote.")
        records = read_metrics(path)
        if not records:
            raise DataError(f"{path} holds no record; wait for the run's first logged step.")
        runs.append(Run(name=run_dir.resolve().name, first_step=end, records=records))
        end += int(records[-1]["step"] or 0)
    return runs


def running_mean(values: Sequence[float], *, window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    means: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def draw(runs: Sequence[Run], *, out: Path) -> None:
    """Write one PNG with a panel per metric and a colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(PANELS), 1, sharex=True, figsize=(10, 2.4 * len(PANELS)))
    for metric, axis in zip(PANELS, axes, strict=True):
        for index, run in enumerate(runs):
            _draw_curve(axis, run, metric=metric, color=f"C{index}")
            if index:
                axis.axvline(run.first_step, color="0.7", linewidth=0.8, zorder=0)
        unit = METRICS[metric].unit
        axis.set_ylabel(metric if unit == "1" else f"{metric} ({unit})")
        axis.grid(alpha=0.25)
        if metric in _LOG_SCALE:
            axis.set_yscale("log")
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=3, frameon=False)
    axes[-1].set_xlabel("step" if len(runs) == 1 else "step, runs one after another")
    figure.align_ylabels()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _draw_curve(axis: Any, run: Run, *, metric: str, color: str) -> None:
    steps, values = run.curve(metric)
    if metric != _SMOOTHED:
        axis.plot(steps, values, color=color, linewidth=1.2)
        return
    axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
    window = max(1, len(values) // _SMOOTHING_SHARE)
    axis.plot(
        steps, running_mean(values, window=window), color=color, linewidth=1.6, label=run.name
    )


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 the picture was written, 1 a run or the picture's place is not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot",
        description="Draw loss, gradient norm, learning rate and pack fill of runs as one PNG.",
        epilog="example: python -m tools.plot runs/eve_tiny_stage1 runs/eve_tiny_stage2_1 --out curves.png",
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder with metrics.jsonl"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="PNG", help="picture to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture if it exists")
    options = parser.parse_args(arguments)
    if options.out.exists() and not options.overwrite:
        raise ConfigError(f"{options.out} exists; add --overwrite to replace it.")
    runs = load_runs(options.run_dirs)
    draw(runs, out=options.out)
    print(f"curves of {len(runs)} runs written to {options.out}")
    return 0


if __name__ == "__main__":
    end_with(main)
