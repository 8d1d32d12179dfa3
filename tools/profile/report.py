# SPDX-License-Identifier: Apache-2.0
"""From a run's profile folder to one report: report.json, report.md, timeline.png.

Tokens and FLOPs are those of the captured steps, from the sidecar that the trainer wrote beside each trace; FLOPs are
ours (metrics/flops.py), because a formula of the dense causal model would be wrong for packs and frozen weights."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eve.metrics.captured import capture_file

from .figures import RankFigures, mean_of, skew
from .kineto import read_kineto
from .nsight import read_nsight
from .trace import ProfileError, Trace

REPORT = "report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """One rank: its trace's figures and its sidecar."""

    figures: RankFigures
    facts: dict[str, Any]


def load(folder: Path) -> list[Captured]:
    """Every captured rank of a profile folder.

    Raises: ProfileError if there is none, or a rank's sidecar is broken, has no trace beside it, or one of other steps.
    """
    sidecars = sorted(folder.glob("rank*.steps.json"))
    if not sidecars:
        raise ProfileError(
            f"{folder} holds no rank*.steps.json; name the folder RUN_DIR/profile of a run with profile.tool set."
        )
    captured = []
    for sidecar in sidecars:
        facts = _facts(sidecar)
        figures = RankFigures(_trace(folder, rank=facts["rank"]))
        in_trace = [step.number for step in figures.steps]
        in_sidecar = [step["step"] for step in facts["steps"]]
        if in_trace != in_sidecar:
            raise ProfileError(
                f"rank {facts['rank']}: the trace holds steps {in_trace}, {sidecar} tells of {in_sidecar}; they are of "
                "two captures, or one broke off: capture again."
            )
        captured.append(Captured(figures=figures, facts=facts))
    return captured


def _facts(sidecar: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(sidecar.read_text())
        _ = facts["rank"], [step["step"] for step in facts["steps"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ProfileError(
            f"{sidecar} is no record of captured steps ({type(error).__name__}: {error}); capture again."
        ) from error
    return facts


def _trace(folder: Path, *, rank: int) -> Trace:
    kineto = capture_file(folder, rank=rank, suffix=".kineto.json")
    if kineto.exists():
        return read_kineto(kineto, rank=rank)
    sqlite = capture_file(folder, rank=rank, suffix=".sqlite")
    if not sqlite.exists():
        _export(capture_file(folder, rank=rank, suffix=".nsys-rep"), sqlite)
    return read_nsight(sqlite, rank=rank)


def export_command(report: Path, sqlite: Path) -> list[str]:
    """The command that turns Nsight's report into the SQLite file that the reader takes."""
    return ["nsys", "export", "--type", "sqlite", "--output", str(sqlite), str(report)]


def _export(report: Path, sqlite: Path) -> None:
    command = export_command(report, sqlite)
    if not report.exists():
        raise ProfileError(
            f"{report.parent} has neither a .kineto.json nor a .nsys-rep nor a .sqlite of {report.stem}; "
            "nsys writes its report when the process ends"
        )
    if shutil.which("nsys") is None:
        raise ProfileError(
            f"nsys is not on PATH; run where it is: {' '.join(command)}, then report again."
        )
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ProfileError(f"{' '.join(command)} failed: {result.stderr.strip()}")


def make_report(captured: Sequence[Captured], *, peak_flops: float | None = None) -> dict[str, Any]:
    """All figures as one JSON object; seconds per step, the mean over the captured ranks where not said otherwise.

    `peak_flops`: FLOP/s of one device, in place of the sidecar's (none there for a device that metrics/peak.py does
    not list)."""
    facts, first = captured[0].facts, captured[0].figures
    ranks = [one.figures for one in captured]
    step_time = sum(rank.step_time_s for rank in ranks) / len(ranks)
    logged = [step["step_time_s"] for one in captured for step in one.facts["steps"]]
    return {
        "source": first.trace.source,
        "device": facts["device"],
        "dtype": facts["dtype"],
        "recipe": facts["recipe"],
        "stage": facts["stage"],
        "world_size": facts["world_size"],
        "parallel": facts["parallel"],
        "ranks": [rank.trace.rank for rank in ranks],
        "steps": [step.number for step in first.steps],
        "step_time_s": step_time,
        "logged_step_time_s": sum(logged) / len(logged),
        "throughput": _throughput(facts, step_time=step_time, peak_flops=peak_flops),
        "time": mean_of([rank.division() for rank in ranks])
        | {"data_wait_s": sum(rank.data_wait_s() for rank in ranks) / len(ranks)},
        "kinds": mean_of([rank.by_kind() for rank in ranks]),
        "modalities": mean_of([rank.by_modality() for rank in ranks]),
        "modules": first.by_module(),
        "layers": first.by_layer(),
        "top_kernels": first.top_kernels(),
        "skew": _skews(ranks),
    }


def _throughput(
    facts: dict[str, Any], *, step_time: float, peak_flops: float | None
) -> dict[str, float | None]:
    steps, processes = facts["steps"], facts["world_size"]
    peak = peak_flops or facts["peak_flops"]

    def per_second(name: str) -> float:
        return sum(step[name] for step in steps) / len(steps) / step_time

    vision, text = per_second("vision_tokens"), per_second("text_tokens")
    ideal, executed = (per_second(f"{name}_flops") / processes for name in ("ideal", "executed"))
    return {
        "vision_tokens_per_s": vision,
        "text_tokens_per_s": text,
        "tokens_per_s": vision + text,
        "tokens_per_s_per_gpu": (vision + text) / processes,
        "fill": (vision + text) / per_second("computed_tokens"),
        "useful_tflops_per_gpu": ideal / 1e12,
        "executed_tflops_per_gpu": executed / 1e12,
        "peak_tflops": peak / 1e12 if peak else None,
        "mfu": ideal / peak if peak else None,
        "hardware_utilization": executed / peak if peak else None,
    }


def _skews(ranks: Sequence[RankFigures]) -> dict[str, Any]:
    """Of the step, which collectives make alike on all ranks, and of the compute in it, which they do not."""
    by_rank = {rank.trace.rank: rank for rank in ranks}
    return {
        "step_time": skew({number: rank.step_time_s for number, rank in by_rank.items()}),
        "compute": skew({n: rank.division()["compute_s"] for n, rank in by_rank.items()}),
    }
