# SPDX-License-Identifier: Apache-2.0
"""How a step is divided where work overlaps, by both readers, to the nanosecond: streams beside each other, collectives
hidden fully, by half and not, work and ranges that cross a step's end, tables that are missing. Two steps, [0, 1000]
and [1100, 2100] microseconds; kernels are (name, start, end, stream)."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.profile_fixtures import (
    FLASH,
    GATHER,
    GEMM,
    Kernel,
    Marked,
    write_kineto,
    write_sidecar,
    write_sqlite,
)
from tools.profile.report import load, make_report
from tools.profile.trace import ProfileError

STEPS = (Marked("eve/step=11", 0, 1000), Marked("eve/step=12", 1100, 2100))
WRITERS: dict[str, tuple[str, Callable[..., None]]] = {
    "nsight": ("rank0000.sqlite", write_sqlite),
    "kineto": ("rank0000.kineto.json", write_kineto),
}
Piece = tuple[str, float, float, int]
CASES: dict[str, tuple[list[Piece], dict[str, float]]] = {
    "nothing ran": ([], {}),
    "two streams compute beside each other": (
        [(GEMM, 100, 300, 7), (GEMM, 200, 400, 8), (FLASH, 250, 260, 9)],
        {"compute": 300},
    ),
    "a collective hidden fully": (
        [(GEMM, 100, 500, 7), (GATHER, 200, 400, 20)],
        {"compute": 400, "communication": 200},
    ),
    "hidden to its first and last nanosecond": (
        [(GEMM, 100, 500, 7), (GATHER, 100, 500, 20)],
        {"compute": 400, "communication": 400},
    ),
    "hidden by half": (
        [(GEMM, 100, 300, 7), (GATHER, 200, 400, 20)],
        {"compute": 200, "communication": 200, "exposed_communication": 100},
    ),
    "not hidden": (
        [(GEMM, 100, 200, 7), (GATHER, 200, 400, 20)],
        {"compute": 100, "communication": 200, "exposed_communication": 200},
    ),
    "hidden by two streams in turn, with a hole": (
        [(GEMM, 100, 200, 7), (FLASH, 250, 400, 8), (GATHER, 150, 300, 20)],
        {"compute": 250, "communication": 150, "exposed_communication": 50},
    ),
    "two collectives at the same time": (
        [(GEMM, 100, 200, 7), (GEMM, 250, 300, 7), (GATHER, 150, 280, 20), (GATHER, 260, 400, 21)],
        {"compute": 150, "communication": 250, "exposed_communication": 150},
    ),
    "a collective over the end of a step": (  # of 950-1150, 50 in each step, 30 of them hidden
        [(GATHER, 950, 1150, 20), (GEMM, 1120, 1180, 7)],
        {"compute": 60, "communication": 100, "exposed_communication": 70},
    ),
    "one kernel from before the first step to behind the last": (
        [(GEMM, -50, 2200, 7), (GATHER, 500, 600, 20)],
        {"compute": 2000, "communication": 100},
    ),
    "work between steps and of no length": ([(GEMM, 1000, 1100, 7), (GATHER, 500, 500, 20)], {}),
    "copies beside everything": (  # 100-600: compute to 200, all-gather to 300, then the copy alone
        [(GEMM, 100, 200, 7), (GATHER, 150, 300, 20), ("memcpy", 100, 600, 22)],
        {"compute": 100, "communication": 150, "exposed_communication": 100, "copies": 500,
         "exposed_copies": 300},
    ),
}  # fmt: skip


@pytest.fixture(params=WRITERS)
def report_of(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Callable[[list[Kernel], list[Marked]], dict[str, Any]]:
    name, write = WRITERS[request.param]

    def made(kernels: list[Kernel], ranges: list[Marked]) -> dict[str, Any]:
        # Without any event of a device a trace of torch.profiler is one of a CPU.
        outside = Kernel(GEMM, 5000, 5001, 7, launched=4999)
        write(tmp_path / name, kernels=[*kernels, outside], ranges=[*STEPS, *ranges])
        write_sidecar(tmp_path)
        return make_report(load(tmp_path))

    return made


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_divided_exactly(report_of, case: str) -> None:  # type: ignore[no-untyped-def]
    pieces, expected = CASES[case]
    report = report_of([Kernel(*piece, launched=piece[1] - 1) for piece in pieces], [])
    found = {name.removesuffix("_s"): 2e6 * value for name, value in report["time"].items()}
    assert found.pop("data_wait") == 0
    names = ("compute", "exposed_communication", "exposed_copies")
    idle = 2000 - sum(expected.get(name, 0) for name in names)
    everything = dict.fromkeys(found, 0.0) | expected | {"idle": idle}
    assert found == pytest.approx(everything, abs=1e-6)


def test_sums_over_streams_count_twice_what_overlaps(report_of) -> None:  # type: ignore[no-untyped-def]
    kernels = [Kernel(GEMM, 100, 300, 7, launched=99), Kernel(GEMM, 200, 400, 8, launched=99)]
    report = report_of(kernels, [])
    assert report["kinds"] == pytest.approx({"matrix product": 200e-6})
    (kernel,) = report["top_kernels"]
    assert (kernel["calls"], kernel["mean_us"]) == (1, pytest.approx(200))


def test_ranges_over_the_end_of_a_step(report_of) -> None:  # type: ignore[no-untyped-def]
    """Waiting counts inside steps only; work belongs to the module that was open when it was launched, in whichever
    step it runs, and one launched in front of the first step and run inside it belongs to none."""
    ranges = [Marked("eve/data_wait", 980, 1130), Marked("eve/module=linear_fc1.vision", 940, 1150)]
    kernels = [
        Kernel(GEMM, 990, 1010, 7, launched=950),
        Kernel(GEMM, 1145, 1185, 7, launched=1140),
        Kernel(FLASH, 0, 10, 7, launched=-20),
    ]
    report = report_of(kernels, ranges)
    assert report["time"]["data_wait_s"] == pytest.approx((20 + 30) / 2 * 1e-6)
    assert report["modalities"] == pytest.approx(
        {"vision": (10 + 40) / 2 * 1e-6, "text": 0, "both": 10 / 2 * 1e-6}
    )


@pytest.mark.parametrize(
    "table",
    ["StringIds", "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_RUNTIME", "CUPTI_ACTIVITY_KIND_KERNEL"],
)
def test_a_missing_table_is_named(tmp_path: Path, table: str) -> None:
    write_sqlite(tmp_path / "rank0000.sqlite")
    write_sidecar(tmp_path)
    with sqlite3.connect(tmp_path / "rank0000.sqlite") as db:
        db.execute(f"DROP TABLE {table}")
    with pytest.raises(ProfileError, match=f"has no table {table}"):
        load(tmp_path)


def test_a_capture_without_copies_has_no_table_of_them(tmp_path: Path) -> None:
    write_sqlite(tmp_path / "rank0000.sqlite")
    write_sidecar(tmp_path)
    with sqlite3.connect(tmp_path / "rank0000.sqlite") as db:
        db.execute("DROP TABLE CUPTI_ACTIVITY_KIND_MEMCPY")
    assert make_report(load(tmp_path))["time"]["copies_s"] == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"rank": 0}'])
def test_a_broken_record_of_steps_is_named(tmp_path: Path, content: str) -> None:
    write_sqlite(tmp_path / "rank0000.sqlite")
    (tmp_path / "rank0000.steps.json").write_text(content)
    with pytest.raises(ProfileError, match=r"rank0000\.steps\.json is no record of captured steps"):
        load(tmp_path)


def test_a_record_of_other_steps_is_refused(tmp_path: Path) -> None:
    """Its tokens over that trace's time would be a throughput of nothing."""
    write_sqlite(tmp_path / "rank0000.sqlite")
    write_sidecar(tmp_path)
    sidecar = tmp_path / "rank0000.steps.json"
    facts = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(facts | {"steps": facts["steps"][1:]}))
    with pytest.raises(ProfileError, match=r"holds steps \[11, 12\], .* tells of \[12\]"):
        load(tmp_path)
