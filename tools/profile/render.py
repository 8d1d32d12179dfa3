# SPDX-License-Identifier: Apache-2.0
"""A report as Markdown, and one captured step as a picture: a lane per stream, a colour per kind of work."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import PlacedWork, RankFigures
from .kinds import COMMUNICATION, COPY

_MODULES, _NAME_WIDTH = 24, 90
_MAX_RANKS, _MAX_LANES = 4, 6
_HOST = ("data_wait", "forward", "backward", "optimizer")
_COLOURS = {
    "matrix product": "#3b6fb5",
    "attention": "#5aa469",
    COMMUNICATION: "#c0392b",
    COPY: "#e0a030",
    "permutation": "#8e5ea2",
    "optimizer": "#7f6a55",
    "norm": "#4db6c4",
    "elementwise": "#9aa0a6",
    "gather and scatter": "#b5bd4c",
    "cast and transpose": "#d98cc0",
}
_OTHER_COLOUR = "#d0c8bc"


def markdown(report: dict[str, Any]) -> str:
    """The whole report, tables with milliseconds per step."""
    steps = report["steps"]
    title = f"# Profile of {report['recipe']}: steps {steps[0]} to {steps[-1]}"
    blocks = [
        title,
        f"{report['source']}, {report['device']}, {report['dtype']}, {report['world_size']} processes, captured ranks "
        f"{', '.join(map(str, report['ranks']))}. Times are per step.",
        _table([("what", "value"), *_headline(report)]),
        "## Where the step goes",
        _table([("part", "ms", "share"), *_division(report)]),
        "## Work by kind, summed over streams",
        _table([("kind", "ms", "of the step"), *_shares(report["kinds"], report)]),
        "## Work by modality",
        _table([("modality", "ms", "of the step"), *_shares(report["modalities"], report)]),
        f"## Work by module, rank {report['ranks'][0]}",
        _table([("module", "forward ms", "backward ms", "other ms"), *_modules(report)]),
        f"## Layers, rank {report['ranks'][0]}",
        _table([("layer", "forward ms", "backward ms"), *_layers(report)]),
        f"## Top kernels, rank {report['ranks'][0]}",
        _table([("kernel", "kind", "calls", "ms", "mean us"), *_kernels(report)]),
        "## Ranks",
        _table([("what", "slowest", "fastest", "slowest / mean"), *_skew(report)]),
    ]
    return "\n\n".join(blocks) + "\n"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _headline(report: dict[str, Any]) -> list[tuple[str, str]]:
    rate = report["throughput"]
    return [
        ("step time", f"{_ms(report['step_time_s'])} ms"),
        ("step time of the log", f"{_ms(report['logged_step_time_s'])} ms"),
        ("useful tokens/s", f"{rate['tokens_per_s']:,.0f} = vision {rate['vision_tokens_per_s']:,.0f} + text "
                            f"{rate['text_tokens_per_s']:,.0f}"),
        ("useful tokens/s per device", f"{rate['tokens_per_s_per_gpu']:,.0f}"),
        ("pack fill", _percent(rate["fill"])),
        ("useful TFLOP/s per device", f"{rate['useful_tflops_per_gpu']:,.4g}"),
        ("MFU", _percent(rate["mfu"])),
        ("hardware utilization", _percent(rate["hardware_utilization"])),
    ]  # fmt: skip


def _division(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    time, step = report["time"], report["step_time_s"]
    parts = {
        "compute": time["compute_s"],
        "exposed communication": time["exposed_communication_s"],
        "exposed copies": time["exposed_copies_s"],
        "idle": time["idle_s"],
    }
    beside = {
        "(all communication)": time["communication_s"],
        "(all copies)": time["copies_s"],
        "(host waits for data)": time["data_wait_s"],
    }
    return [(name, _ms(value), _percent(value / step)) for name, value in (parts | beside).items()]


def _shares(values: dict[str, float], report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(n, _ms(value), _percent(value / report["step_time_s"])) for n, value in values.items()]


def _modules(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (row["module"], _ms(row["forward_s"]), _ms(row["backward_s"]), _ms(row["other_s"]))
        for row in report["modules"][:_MODULES]
    ]


def _layers(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (str(row["layer"]), _ms(row["forward_s"]), _ms(row["backward_s"]))
        for row in report["layers"]
    ]


def _kernels(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{row['name'][:_NAME_WIDTH]}`",
            row["kind"],
            f"{row['calls']:,.1f}",
            _ms(row["total_s"]),
            f"{row['mean_us']:,.1f}",
        )
        for row in report["top_kernels"]
    ]


def _skew(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name.replace("_", " "),
            f"rank {row['slowest_rank']}, {_ms(row['slowest_s'])} ms",
            f"rank {row['fastest_rank']}, {_ms(row['fastest_s'])} ms",
            f"{row['slowest_over_mean']:.3f}",
        )
        for name, row in report["skew"].items()
    ]


def draw_timeline(ranks: Sequence[RankFigures], *, out: Path) -> None:
    """The first captured step of up to four ranks as one PNG, each on its own clock."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    shown = list(ranks)[:_MAX_RANKS]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(14, 3.2 * len(shown)), squeeze=False)
    kinds: dict[str, str] = {}
    for rank, axis in zip(shown, axes[:, 0], strict=True):
        _draw_rank(axis, rank, kinds)
    axes[-1, 0].set_xlabel("ms from the beginning of the step")
    handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="upper center", ncols=min(6, len(handles)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _draw_rank(axis: Any, rank: RankFigures, kinds: dict[str, str]) -> None:
    step = rank.steps[0]
    lanes: dict[str, list[PlacedWork]] = defaultdict(list)
    for item in rank.placed:
        if item.work.start < step.end and item.work.end > step.start:
            lanes[item.work.lane].append(item)
    busiest = sorted(lanes, key=lambda lane: -sum(item.inside for item in lanes[lane]))[:_MAX_LANES]
    for row, lane in enumerate(busiest):
        by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for item in lanes[lane]:
            kind = item.kind.split(":")[0]
            start = max(item.work.start, step.start)
            by_kind[kind].append(
                ((start - step.start) / 1e6, (min(item.work.end, step.end) - start) / 1e6)
            )
        for kind, bars in by_kind.items():
            colour = kinds.setdefault(kind, _COLOURS.get(kind, _OTHER_COLOUR))
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour)
    _draw_host(axis, rank, row=len(busiest))
    axis.set_yticks(range(len(busiest) + 1), [*busiest, "host"])
    axis.set_xlim(0, (step.end - step.start) / 1e6)
    axis.set_title(f"rank {rank.trace.rank}, step {step.number}", loc="left", fontsize=10)


def _draw_host(axis: Any, rank: RankFigures, *, row: int) -> None:
    step = rank.steps[0]
    for item in rank.trace.ranges:
        name = item.name.split("=")[0]
        if name in _HOST and step.start <= item.start < step.end:
            start, width = (item.start - step.start) / 1e6, (item.end - item.start) / 1e6
            axis.broken_barh([(start, width)], (row - 0.4, 0.8), facecolors="0.85", edgecolor="0.4")
            if width > 0.04 * (step.end - step.start) / 1e6:
                axis.text(start + width / 2, row, name, ha="center", va="center", fontsize=7)
