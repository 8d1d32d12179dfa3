# SPDX-License-Identifier: Apache-2.0
"""Both readers on one made-up capture with known overlaps: exact figures, refusals, files, comparison."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.errors import ConfigError
from tests.tools.profile_fixtures import FLASH, GEMM, write_kineto, write_sidecar, write_sqlite
from tools.profile.__main__ import main
from tools.profile.compare import parse_share
from tools.profile.kinds import kernel_kind
from tools.profile.kineto import innermost, read_kineto
from tools.profile.nsight import read_nsight
from tools.profile.report import load, make_report
from tools.profile.trace import ProfileError, intersection, length, union

WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "nsight": ("rank0000.sqlite", write_sqlite),
    "kineto": ("rank0000.kineto.json", write_kineto),
}
US = 1e-6


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A profile folder with one rank, in each of the two formats."""
    name, write = WRITERS[request.param]
    write(tmp_path / name)
    write_sidecar(tmp_path)
    return tmp_path


def report_of(folder: Path) -> dict[str, Any]:
    return make_report(load(folder))


def test_the_step_is_divided_exactly(folder: Path) -> None:
    """See the picture in profile_fixtures.py; of two steps, so each figure is half of what it adds up to."""
    report = report_of(folder)
    assert report["steps"] == [11, 12]
    assert report["step_time_s"] == 1000 * US
    compute = 200 + 50 + 100 + 100 + 50  # Adam only up to the end of its step; nothing of the gap
    exposed = 300 - 100 - 50  # the all-gather without what lies under the GEMM and the attention
    exposed_copies = 20  # of 40, the first half under the all-gather
    expected = {
        "compute_s": compute,
        "communication_s": 300,
        "exposed_communication_s": exposed,
        "copies_s": 40,
        "exposed_copies_s": exposed_copies,
        "idle_s": 2000 - compute - exposed - exposed_copies,
        "data_wait_s": 30,
    }
    assert report["time"] == pytest.approx({k: v * US / 2 for k, v in expected.items()}, rel=1e-12)


def test_kinds_modules_layers_and_modalities(folder: Path) -> None:
    report = report_of(folder)
    kinds = {
        "matrix product": 300,
        "communication: all-gather": 300,
        "attention": 50,
        "copy: memcpy": 40,
        "optimizer": 100,
        "permutation": 50,
    }
    assert report["kinds"] == pytest.approx({k: v * US / 2 for k, v in kinds.items()}, rel=1e-12)
    modules = {row.pop("module"): row for row in report["modules"]}
    assert modules["linear_qkv.vision"] == pytest.approx(
        {
            "forward_s": 250 * US,
            "backward_s": 0,
            "other_s": 0,
        }  # GEMM and the all-gather launched in it
    )
    assert modules["linear_qkv.text"] == pytest.approx(
        {"forward_s": 0, "backward_s": 50 * US, "other_s": 0}
    )
    assert modules["optimizer"]["other_s"] == pytest.approx(50 * US)
    assert modules["permutation"]["forward_s"] == pytest.approx(25 * US)
    assert modules["data_wait"]["other_s"] == pytest.approx(20 * US)
    assert report["modalities"] == pytest.approx(
        {"vision": 250 * US, "text": 50 * US, "both": 120 * US}
    )
    assert report["layers"] == [
        {"layer": 1, "forward_s": pytest.approx(275 * US), "backward_s": 0},
        {"layer": 2, "forward_s": 0, "backward_s": pytest.approx(50 * US)},
    ]


def test_throughput_is_that_of_the_sidecar_over_the_trace(folder: Path) -> None:
    rate = report_of(folder)["throughput"]
    assert rate["vision_tokens_per_s"] == pytest.approx(600 / 1e-3)
    assert rate["text_tokens_per_s"] == pytest.approx(300 / 1e-3)
    assert rate["tokens_per_s_per_gpu"] == pytest.approx(900 / 1e-3 / 2)
    assert rate["fill"] == pytest.approx(0.9)
    assert rate["mfu"] == pytest.approx(4e8 / 1e-3 / 2 / 1e12)
    assert rate["hardware_utilization"] == pytest.approx(5e8 / 1e-3 / 2 / 1e12)


def test_top_kernels_name_calls_and_time(folder: Path) -> None:
    kernels = {row["name"]: row for row in report_of(folder)["top_kernels"]}
    assert kernels[GEMM]["calls"] == 1
    assert kernels[GEMM]["mean_us"] == pytest.approx(150)
    assert kernels[FLASH]["total_s"] == pytest.approx(25 * US)
    assert not any("FillFunctor" in name for name in kernels), "it ran between the steps"


def test_skew_names_the_slowest_rank(tmp_path: Path) -> None:
    for rank in (0, 3):
        write_sqlite(tmp_path / f"rank{rank:04d}.sqlite")
        write_sidecar(tmp_path, rank=rank)
    with sqlite3.connect(tmp_path / "rank0003.sqlite") as db:  # an attention of 150 in place of 50
        db.execute(
            "UPDATE CUPTI_ACTIVITY_KIND_KERNEL SET start = start - 100000 WHERE start = 400000"
        )
    skew = report_of(tmp_path)["skew"]["compute"]
    assert (skew["slowest_rank"], skew["fastest_rank"]) == (3, 0)
    assert skew["slowest_s"] == pytest.approx(300 * US)
    assert skew["slowest_over_mean"] == pytest.approx(300 / 275)


def test_report_command_writes_three_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder)]) == 0
    assert "wrote report.json, report.md and timeline.png" in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert "| exposed communication | 0.075 | 7.5% |" in text
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(folder)]) == 1
    assert "add --overwrite" in capsys.readouterr().err


def test_compare_fails_over_its_limit_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = report_of(folder), report_of(folder)
    after["throughput"]["tokens_per_s_per_gpu"] /= 1.06  # 6% more time per token
    after["recipe"] = "eve7b_stage3"
    names = [str(tmp_path / "before.json"), str(tmp_path / "after.json")]
    for name, report in zip(names, (before, after), strict=True):
        Path(name).write_text(json.dumps(report))
    assert main(["compare", *names]) == 1
    captured = capsys.readouterr()
    assert "takes +6.0% of the time before, allowed is +5.0%" in captured.err
    assert "note: recipe was eve7b_stage2_2, is eve7b_stage3" in captured.out
    assert main(["compare", *names, "--fail-over", "7%"]) == 0
    assert main(["compare", *reversed(names), "--fail-over", "0"]) == 0
    assert main(["compare", *names, "--fail-over", "5"]) == 2
    assert "write 5% or 0.05" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"rates": {}}', "0", "null"], ids=lambda text: text or "empty"
)
def test_what_is_no_report_cannot_pass(
    folder: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, other = tmp_path / "whole.json", tmp_path / "other.json"
    whole.write_text(json.dumps(report_of(folder)))
    other.write_text(content)
    for pair in ((whole, other), (other, whole), (whole, tmp_path / "missing.json")):
        assert main(["compare", *map(str, pair)]) == 1
        assert "is no report" in capsys.readouterr().err


def test_a_report_without_tokens_cannot_pass(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, other = tmp_path / "whole.json", tmp_path / "other.json"
    report = report_of(folder)
    whole.write_text(json.dumps(report))
    for rate in (0.0, float("nan"), None):
        report["throughput"]["tokens_per_s_per_gpu"] = rate
        other.write_text(json.dumps(report))
        assert main(["compare", str(whole), str(other)]) == 1
        assert "is no report with tokens per second" in capsys.readouterr().err


def test_unreadable_captures_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without nsys
    with pytest.raises(ProfileError, match=r"holds no rank\*.steps.json"):
        load(tmp_path)
    write_sidecar(tmp_path)
    with pytest.raises(ProfileError, match=r"neither a .kineto.json nor a .nsys-rep nor a .sqlite"):
        load(tmp_path)
    (tmp_path / "rank0000.nsys-rep").touch()
    with pytest.raises(ProfileError, match="run where it is: nsys export --type sqlite"):
        load(tmp_path)
    sqlite = tmp_path / "rank0000.sqlite"
    write_sqlite(sqlite)
    with sqlite3.connect(sqlite) as db:
        db.execute("ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL RENAME COLUMN globalPid TO pid")
    with pytest.raises(ProfileError, match="CUPTI_ACTIVITY_KIND_KERNEL has no column globalPid"):
        load(tmp_path)
    with sqlite3.connect(sqlite) as db:
        db.execute("DROP TABLE NVTX_EVENTS")
    with pytest.raises(ProfileError, match="has no table NVTX_EVENTS"):
        load(tmp_path)
    sqlite.write_text("not a data base, and long enough to be read as one" * 20)
    with pytest.raises(ProfileError, match="is no SQLite export"):
        read_nsight(sqlite, rank=0)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ProfileError, match=r"is no trace of torch\.profiler"):
        read_kineto(tmp_path / "x.json", rank=0)


def test_a_trace_without_our_ranges_is_refused(tmp_path: Path) -> None:
    write_sidecar(tmp_path)
    write_sqlite(tmp_path / "rank0000.sqlite")
    with sqlite3.connect(tmp_path / "rank0000.sqlite") as db:
        db.execute("DELETE FROM NVTX_EVENTS")
    with pytest.raises(ProfileError, match="the trace holds no range eve/step=N"):
        load(tmp_path)


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0)])
def test_shares_have_two_forms(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)
    for wrong in ("-5%", "five", "nan", "5", "inf%"):
        with pytest.raises(ConfigError, match="is not a share"):
            parse_share(wrong)


def test_arithmetic_of_intervals() -> None:
    merged = union([(5, 7), (0, 2), (1, 3), (3, 4), (9, 9)])
    assert merged == [(0, 4), (5, 7)]
    assert intersection(merged, [(2, 6), (6, 10)]) == [(2, 4), (5, 6), (6, 7)]
    assert length(merged) == 6


def test_nested_operators_share_out_their_time() -> None:
    """matmul [0, 10] around mm [2, 5], then copy [7, 9] with an empty operator in it, then add [12, 13]."""
    nested = [("mm", 2, 5), ("matmul", 0, 10), ("add", 12, 13), ("copy", 7, 9), ("view", 8, 8)]
    pieces = list(innermost(nested))
    assert [piece for piece in pieces if piece[0] != "copy"] == [
        ("matmul", 0, 2), ("mm", 2, 5), ("matmul", 5, 7), ("matmul", 9, 10), ("add", 12, 13)
    ]  # fmt: skip
    assert sum(end - start for name, start, end in pieces if name == "copy") == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "communication: reduce-scatter"),
        ("ncclDevKernel_SendRecv", "communication: send-receive"),
        ("gloo:all_reduce", "communication: all-reduce"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_general_kernel", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("aten::mm", "matrix product"),
        ("somebody's kernel", "other"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind
