# SPDX-License-Identifier: Apache-2.0
"""Each check of a node can fail, and says what was found and what was expected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import preflight
from tests.slurm.conftest import REPO


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_good_node_gives_one_json_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "slurm.preflight", str(tmp_path)],
        env={**os.environ, "SLURMD_NODENAME": "node07", "EVE_MIN_FREE_GIB": "0"},
        cwd=REPO,
        text=True,
        capture_output=True,
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert report["node"] == "node07"
    assert report["problems"] == []
    assert report["versions"]["torch"].startswith("2.")


def test_bad_node_exits_with_1_and_names_the_problem(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "slurm.preflight", str(tmp_path / "missing")],
        cwd=REPO,
        text=True,
        capture_output=True,
    )
    assert result.returncode == 1
    assert "cannot write into" in result.stderr
    assert "No such file or directory" in result.stderr


def test_missing_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "seq 0 6", monkeypatch)
    assert preflight.gpu_problems({"SLURM_GPUS_ON_NODE": "8"}) == ["found 7 GPUs, expected 8"]
    assert preflight.gpu_problems({"SLURM_GPUS_ON_NODE": "7"}) == []


def test_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, "echo 'Unable to determine the device handle'; exit 9", monkeypatch)
    (problem,) = preflight.gpu_problems({"SLURM_GPUS_ON_NODE": "8"})
    assert problem == "nvidia-smi failed with 9: Unable to determine the device handle"


def test_full_disk(tmp_path: Path) -> None:
    (problem,) = preflight.run_dir_problems(tmp_path, min_free_gib=1e9)
    assert "expected 1e+09 (EVE_MIN_FREE_GIB)" in problem
    assert list(tmp_path.iterdir()) == []


def report(*, time: float = 1000.0, torch: str = "2.13.0") -> dict[str, object]:
    return {"time": time, "versions": {"torch": torch}, "problems": []}


def test_nodes_are_compared() -> None:
    reports = {f"node{n}": report() for n in range(5)}
    assert preflight.outliers(reports) == {}
    reports["node1"] = report(torch="2.12.0")
    reports["node3"] = report(time=1000.0 + preflight.MAX_CLOCK_SPREAD_S + 1)
    found = preflight.outliers(reports)
    assert set(found) == {"node1", "node3"}
    assert "2.12.0" in found["node1"][0]
    assert "clock is +61 s" in found["node3"][0]


def test_silent_node_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun = tmp_path / "srun"
    srun.write_text(
        '#!/bin/sh\necho "srun: launching"\nSLURMD_NODENAME=node01 exec python3 -m slurm.preflight /tmp\n'
    )
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("EVE_MIN_FREE_GIB", "0")
    monkeypatch.chdir(REPO)
    assert preflight.check_nodes(["node01", "node02"], run_dir=Path("/tmp")) == ["node02"]


def test_reports_are_found_in_any_text() -> None:
    text = 'srun: hello\n{"node": "a", "x": 1}{"node": "b", "x": 2}\n\n{"node": "c"'
    assert preflight.parse_reports(text) == {"a": {"node": "a", "x": 1}, "b": {"node": "b", "x": 2}}
