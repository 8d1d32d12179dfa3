# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one command and within eight minutes on one H200.

    python -m tools.bench.gpu --out docs/measurements

Parts, each in a process of its own with a time budget, so that a crash, an error or a hang costs that part only and
keeps what it had measured: see PARTS. The result is one dated JSON file. On a CPU `--size tiny` runs the same code at
toy sizes on backend `local`, for the tests; what needs a GPU is then listed as skipped. `--dry-run` lists the parts."""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError
from megatron_eve.whole import write_json
from tools.bench.report import BenchmarkError, hardware

BUDGET_S = 480
_PATIENCE = 10
"""Budgets are for a GPU; on a shared CPU at size tiny they are so many times longer."""
_START_S = 10
"""Share of a part's budget for starting and importing; no case begins in the last tenth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One process of the benchmark: `module`.`function`(setting, rows)."""

    name: str
    module: str
    budget_s: int
    answers: str


PARTS = (
    Part(name="environment", module="gpu_full", budget_s=20, answers="versions; the GPU's own bf16 rate"),
    Part(name="modules", module="gpu_modules", budget_s=45, answers="every TE module against fp64, BF16 and FP8"),
    Part(name="model", module="gpu_parity", budget_s=45, answers="loss and all gradients against fp32"),
    Part(name="kernels", module="gpu_layers", budget_s=25, answers="fused permutation and RoPE: error, time"),
    Part(name="layers", module="gpu_layers", budget_s=90, answers="official form, split tax, streams, FP8 speed"),
    Part(name="full", module="gpu_full", budget_s=125, answers="14.2 B parameters with images: MFU, memory"),
    Part(name="fp8", module="gpu_parity", budget_s=90, answers="200 steps in FP8 against BF16"),
    Part(name="images", module="gpu_full", budget_s=40, answers="decoding: speed, difference, memory"),
)  # fmt: skip


def run_part(part: Part, *, size: str, backend: str | None, limit_s: float) -> dict[str, Any]:
    """The part's rows, and how its process ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "rows.json"), Path(folder, "log")
        command = [sys.executable, "-m", "tools.bench.gpu", "--size", size, "--part", part.name]
        command += ["--rows", str(out), "--seconds", str(max(1.0, limit_s - _START_S))]
        command += ["--backend", backend] if backend else []
        with open(log, "w") as file:
            try:
                code = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    timeout=limit_s,
                    env={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ},
                ).returncode
                end = "done" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                end = f"stopped after {limit_s:.0f} s"
        rows = json.loads(out.read_text()) if out.exists() else []
        tail = log.read_text(errors="replace")[-2000:] if end != "done" else ""
    result = {"end": end, "seconds": round(time.monotonic() - started, 1), "rows": rows}
    return result | ({"log": tail} if tail else {})


def run_all(
    names: Sequence[str], *, size: str, backend: str | None, budget_s: float
) -> dict[str, Any]:
    """Part after part; what is left of the budget bounds each."""
    deadline = time.monotonic() + budget_s * (1 if size == "full" else _PATIENCE)
    results: dict[str, Any] = {}
    for part in PARTS:
        if part.name not in names:
            continue
        left = deadline - time.monotonic()
        if left < _START_S:
            results[part.name] = {"end": "not begun: the time was used up", "rows": []}
            continue
        limit = min(part.budget_s * (1 if size == "full" else _PATIENCE), left)
        results[part.name] = run_part(part, size=size, backend=backend, limit_s=limit)
        print(_line(part.name, results[part.name]), flush=True)
    return results


def _line(name: str, result: dict[str, Any]) -> str:
    rows = result["rows"]
    failed = [row["case"] for row in rows if "error" in row]
    skipped = sum("skipped" in row for row in rows)
    text = f"{name}: {result['end']}, {len(rows)} cases, {skipped} skipped"
    return f"{text}, {len(failed)} failed: {'; '.join(failed)}" if failed else text


def has_failed(results: dict[str, Any]) -> bool:
    """Whether a part did not end by itself, or a case of one raised an error."""
    return any(
        result["end"] != "done" or any("error" in row for row in result["rows"])
        for result in results.values()
    )


def _run_here(name: str, *, size: Any, backend: Any, rows_file: Path, seconds: float) -> None:
    """The child's side."""
    import importlib
    import warnings

    warnings.filterwarnings("ignore")
    from tools.bench.gpu_setting import SETTINGS, Rows, Setting

    def save(rows: list[dict[str, Any]]) -> None:
        write_json(rows_file, rows)

    setting: Setting = SETTINGS[size]
    if backend:
        setting = replace(setting, backend=backend)
    (part,) = (part for part in PARTS if part.name == name)
    function: Callable[[Setting, Rows], None] = getattr(
        importlib.import_module(f"tools.bench.{part.module}"), name
    )
    function(setting, Rows(save=save, deadline=time.monotonic() + 0.9 * seconds))


def _result_path(out: Path, *, size: str, overwrite: bool) -> Path:
    day = datetime.date.today().isoformat()
    path = out / (f"gpu-{day}.json" if size == "full" else f"gpu-tiny-{day}.json")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists; add --overwrite or choose another --out.")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.gpu",
        description="Parity, speed and memory on one GPU, in one dated file.",
        epilog="example: python -m tools.bench.gpu --out docs/measurements",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    parser.add_argument("--overwrite", action="store_true", help="replace today's result")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and exit")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: for a CPU")
    parser.add_argument("--backend", choices=("local", "te"), help="other than the size's own")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"in all ({BUDGET_S})")
    for name, kind in (("--part", str), ("--rows", Path), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of the children
    return parser


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all measured and written, 1 something failed (what was measured is written), 2 wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.part:
        _run_here(
            options.part,
            size=options.size,
            backend=options.backend,
            rows_file=options.rows,
            seconds=options.seconds,
        )
        return 0
    if options.dry_run:
        for part in PARTS:
            print(f"{part.name:<12} {part.budget_s:>4} s  {part.answers}")
        print(f"{'in all':<12} {sum(part.budget_s for part in PARTS):>4} s  of {BUDGET_S}")
        return 0
    if options.out is None:
        parser.error("--out is needed, or --dry-run")
    return _measure(options)


def _measure(options: argparse.Namespace) -> int:
    path = _result_path(options.out, size=options.size, overwrite=options.overwrite)
    _refuse_without_gpu(options.size)
    names = options.parts or [part.name for part in PARTS]
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "settings": {"size": options.size, "backend": options.backend, "parts": names},
    }
    result["parts"] = run_all(
        names, size=options.size, backend=options.backend, budget_s=options.budget_s
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"GPU benchmark written to {path}")
    return int(has_failed(result["parts"]))


def _refuse_without_gpu(size: str) -> None:
    from megatron_eve import device

    if size == "full" and not device.has_gpu():
        raise BenchmarkError("no GPU here: --size full needs one; --size tiny runs on a CPU.")


if __name__ == "__main__":
    end_with(main)
