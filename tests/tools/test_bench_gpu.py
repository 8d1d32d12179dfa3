# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark where there is no GPU: every part runs at toy size on backend `local`, those with modules also on
`te` with the stand-in of Transformer Engine, so that nothing but the kernels is new to a GPU. No time is asserted."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.te_runs import PoolWithStandIn
from tools.bench import gpu
from tools.bench.gpu import BUDGET_S, PARTS, has_failed, main, run_part

NAMES = [part.name for part in PARTS]


def run_tiny(name: str, backend: str) -> list[dict[str, Any]]:
    """One part in this worker."""
    import dataclasses
    import importlib

    from tools.bench.gpu_setting import TINY, Rows

    (part,) = (part for part in PARTS if part.name == name)
    rows = Rows(save=lambda rows: None, deadline=time.monotonic() + 600)
    setting = dataclasses.replace(TINY, backend=backend)  # type: ignore[arg-type]
    getattr(importlib.import_module(f"tools.bench.{part.module}"), name)(setting, rows)
    json.dumps(rows.rows)
    return rows.rows


@pytest.fixture(scope="module")
def te1():  # type: ignore[no-untyped-def]
    """One process with the stand-in."""
    pool = PoolWithStandIn(1)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", NAMES)
def test_every_part_runs_on_a_cpu(gloo1, name: str) -> None:  # type: ignore[no-untyped-def]
    (rows,) = gloo1.run(run_tiny, name, "local")
    assert rows and not [row for row in rows if "error" in row], rows
    skipped = {row["case"] for row in rows if "skipped" in row}
    on_gpu_only = {"kernels": 1, "images": 1}
    assert len(skipped) == on_gpu_only.get(name, 0), skipped


@pytest.mark.parametrize("name", ["modules", "model", "layers", "fp8"])
def test_parts_with_modules_run_on_the_stand_in(te1, name: str) -> None:  # type: ignore[no-untyped-def]
    (rows,) = te1.run(run_tiny, name, "te")
    assert rows and not [row for row in rows if "error" in row or "skipped" in row], rows
    assert any("FP8 current" in row["case"] for row in rows)


def test_parity_sees_what_is_wrong(gloo1, te1) -> None:  # type: ignore[no-untyped-def]
    """Errors of fp32 are rounding, those of imitated FP8 are larger, and no frozen weight has a gradient."""
    (exact,) = gloo1.run(run_tiny, "modules", "local")
    (all_rows,) = te1.run(run_tiny, "modules", "te")
    for row in exact:
        assert all(0 < error < 1e-5 for error in row["errors"].values()), row
    fp8 = [row for row in all_rows if row["case"].startswith("FP8 current")]
    assert len(fp8) == 4
    for row in fp8:
        assert 1e-3 < row["errors"]["out"] < 0.1, row
    (partitioned,) = (row for row in all_rows if "partitioned" in row["case"])
    assert partitioned["gradients_of_frozen_weights"] == []
    assert "d vision.layer_norm_weight" in partitioned["errors"]


def test_parts_fit_the_budget_and_the_dry_run_lists_them(capsys) -> None:  # type: ignore[no-untyped-def]
    assert sum(part.budget_s for part in PARTS) <= BUDGET_S == 480
    assert main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)


def test_a_part_that_hangs_or_dies_costs_only_itself(tmp_path: Path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """Three children for one part each: done, stopped at its limit, dead. What they wrote stays."""
    answers = iter(["done", "stopped after 45 s", "exit status -9"])

    def fake(part: Any, *, size: str, backend: Any, limit_s: float) -> dict[str, Any]:
        return {"end": next(answers), "seconds": 1.0, "rows": [{"case": part.name, "took_s": 1.0}]}

    monkeypatch.setattr(gpu, "run_part", fake)
    names = ["environment", "modules", "model"]
    assert main(["--out", str(tmp_path), "--size", "tiny", "--parts", *names]) == 1
    (file,) = tmp_path.glob("gpu-tiny-*.json")
    parts = json.loads(file.read_text())["parts"]
    assert [parts[name]["end"] for name in names] == [
        "done",
        "stopped after 45 s",
        "exit status -9",
    ]
    assert all(parts[name]["rows"] for name in names)
    assert main(["--out", str(tmp_path), "--size", "tiny", "--parts", *names]) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_a_real_child_writes_its_rows() -> None:
    (part,) = (part for part in PARTS if part.name == "environment")
    result = run_part(part, size="tiny", backend=None, limit_s=250)
    assert result["end"] == "done", result.get("log")
    assert [row["case"] for row in result["rows"]] == ["versions", "device"]
    assert not has_failed({"environment": result})


def test_a_child_out_of_time_is_stopped() -> None:
    (part,) = (part for part in PARTS if part.name == "modules")
    result = run_part(part, size="tiny", backend=None, limit_s=0.2)
    assert result["end"].startswith("stopped after") and has_failed({"modules": result})


def test_full_size_needs_a_gpu(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path)]) == 1
    assert "--size tiny runs on a CPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_case_is_kept_with_its_name() -> None:
    from tools.bench.gpu_setting import NotHere, Rows

    saved: list[int] = []
    rows = Rows(save=lambda rows: saved.append(len(rows)), deadline=time.monotonic() + 100)

    def absent() -> dict[str, Any]:
        raise NotHere("no such package")

    rows.attempt("divides", lambda: {"value": 1 / 0})
    rows.attempt("absent", absent)
    rows.attempt("works", lambda: {"value": 2})
    late = Rows(save=lambda rows: None, deadline=0.0)
    late.attempt("late", lambda: {"value": 3})
    first, second, third = rows.rows
    assert "ZeroDivisionError" in first["error"] and first["trace"]
    assert second["skipped"] == "no such package" and third["value"] == 2
    assert saved == [1, 2, 3] and "skipped" in late.rows[0]
