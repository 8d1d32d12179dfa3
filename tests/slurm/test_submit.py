# SPDX-License-Identifier: Apache-2.0
"""Chains of stages and one-node jobs: the exact argv that reaches Slurm."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from submitit.core.utils import FailedJobError

from slurm import jobs, submit
from tests.slurm.conftest import REPO, StubSlurm


def run(
    module: str, *args: str, env: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(
        command, cwd=REPO, env=env or dict(os.environ), text=True, capture_output=True, timeout=120
    )


def test_chain(stub_slurm: StubSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env = {k: v for k, v in stub_slurm.env.items() if k not in submit.FORWARDED}
    left_over = {"RECIPE": "eve7b_stage3", "EVE_MAX_RESTARTS": "9", "SBATCH_NO_REQUEUE": "1"}
    monkeypatch.setattr(os, "environ", env | left_over)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    for stage in ("stage1", "stage2_2"):
        (tmp_path / f"slurm/{stage}.sbatch").touch()
    argv = [
        "stage1",
        "stage2_2",
        "--root",
        "/r",
        "--sbatch-arg=--account=a",
        "--override",
        "optim.peak_lr=1e-5",
    ]
    assert submit.main(argv) == 0
    assert stub_slurm.calls == [
        "RECIPE= sbatch --parsable --account=a slurm/stage1.sbatch "
        "eve7b_stage1 run_dir=/r/eve7b_stage1 EVE_MAX_RESTARTS=9 optim.peak_lr=1e-5",
        "RECIPE= sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes --account=a "
        "slurm/stage2_2.sbatch eve7b_stage2_2 run_dir=/r/eve7b_stage2_2 EVE_MAX_RESTARTS=9 "
        "checkpoint.load_weights_from=/r/eve7b_stage1 optim.peak_lr=1e-5",
    ]
    assert (tmp_path / "logs").is_dir()


def test_refused_stage_names_what_is_queued(stub_slurm: StubSlurm) -> None:
    env = {**stub_slurm.env, "STUB_REFUSE_AT": "2"}
    result = run("slurm.submit", "stage1", "stage2_2", "stage3", env=env)
    assert result.returncode == 1
    assert (
        "sbatch refused stage2_2: sbatch: error: invalid account (queued before it: 101)"
        in result.stderr
    )
    assert len(stub_slurm.calls) == 2


def test_a_controller_that_is_away_is_asked_again(stub_slurm: StubSlurm) -> None:
    words = "Batch job submission failed: Unable to contact slurm controller (connect failure)"
    env = {**stub_slurm.env, "STUB_AWAY": "1", "STUB_WORDS": words, "EVE_SLURM_PATIENCE_S": "60"}
    result = run("slurm.submit", "stage1", env=env)
    assert result.returncode == 0, result.stderr
    assert f"sbatch: sbatch: error: {words}; again in 1 s" in result.stderr


def test_a_job_that_may_be_queued_is_not_submitted_twice(stub_slurm: StubSlurm) -> None:
    words = "Batch job submission failed: Socket timed out on send/recv operation"
    result = run(
        "slurm.submit", "stage1", env={**stub_slurm.env, "STUB_AWAY": "9", "STUB_WORDS": words}
    )
    assert result.returncode == 1
    assert "Socket timed out" in result.stderr
    assert "a job may be queued nevertheless: look with squeue --me" in result.stderr
    assert len(stub_slurm.calls) == 1


def test_what_the_trainer_would_refuse_is_refused_before_anything_is_submitted(
    stub_slurm: StubSlurm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {k: v for k, v in stub_slurm.env.items() if k != "TRAIN_CMD"}
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.chdir(REPO)
    assert submit.main(["stage1", "stage3", "--override", "optim.peek_lr=1"]) == 2
    text = capsys.readouterr().err
    assert "stage3: optim.peek_lr is not a field" in text
    assert "nothing was submitted" in text
    assert submit.main(["stage1", "--model", "eve9b"]) == 2
    assert "there is no recipe 'eve9b_stage1'" in capsys.readouterr().err
    assert submit.main(["stage1", "--override", "run_dir=/r"]) == 2
    assert "expected --root" in capsys.readouterr().err
    assert stub_slurm.calls == []


def test_dry_run_prints_lines_and_submits_nothing(stub_slurm: StubSlurm) -> None:
    result = run(
        "slurm.submit",
        "stage1",
        "stage2_2",
        "--model",
        "eve_tiny",
        "--dry-run",
        env={k: v for k, v in stub_slurm.env.items() if k not in submit.FORWARDED},
    )
    lines = result.stdout.splitlines()
    assert (
        lines[0]
        == "sbatch --parsable slurm/stage1.sbatch eve_tiny_stage1 run_dir=runs/eve_tiny_stage1"
    )
    assert "--dependency=afterok:" in lines[1]
    assert stub_slurm.calls == []


def test_stages_of_a_file_of_ones_own(
    stub_slurm: StubSlurm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {k: v for k, v in stub_slurm.env.items() if k not in ("TRAIN_CMD", *submit.FORWARDED)}
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.chdir(REPO)
    file = tmp_path / "mine.py"
    file.write_text("from megatron_eve.config.recipes.eve7b import eve7b_stage1 as base\n"
                    "def big_stage1():\n    return base()\n")  # fmt: skip
    arguments = ["--model", f"{file}:big", "--dry-run"]
    assert submit.main(["stage1", *arguments]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(f"slurm/stage1.sbatch {file}:big_stage1 run_dir=runs/big_stage1")
    assert submit.main(["stage3", *arguments]) == 2
    assert "has no function 'big_stage3'; it has big_stage1" in capsys.readouterr().err


def test_unknown_stage_is_wrong_usage() -> None:
    result = run("slurm.submit", "stage4")
    assert result.returncode == 2
    assert "stage4" in result.stderr


def test_from_another_folder_the_packages_files_are_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in submit.FORWARDED:
        monkeypatch.delenv(name, raising=False)
    assert submit.main(["stage1", "--dry-run"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    files = REPO / "slurm"
    assert f"sbatch --parsable {files}/stage1.sbatch eve7b_stage1" in line
    assert line.endswith(f"PYTHON={sys.executable} EVE_SLURM={files}")


def test_job_of_a_foreign_module_is_refused() -> None:
    result = run("slurm.jobs", "--local", "--", "http.server")
    assert result.returncode == 2
    assert "found module http.server, expected one of data_prep" in result.stderr


@pytest.mark.timeout(120)
def test_local_job_runs_and_hands_back_the_exit_code(tmp_path: Path) -> None:
    good = run("slurm.jobs", "--local", "--logs", str(tmp_path), "--", "tools.plot", "--help")
    assert good.returncode == 0, good.stderr
    assert "ended with 0" in good.stdout.splitlines()[-1]
    bad = run(
        "slurm.jobs", "--local", "--logs", str(tmp_path), "--", "data_prep", "no-such-command"
    )
    assert bad.returncode == 2, bad.stderr


def test_a_job_is_submitted_once_the_controller_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    away = FailedJobError("sbatch: error: Unable to contact slurm controller (connect failure)")
    executor = Mock()
    executor.submit.side_effect = [away, away, "job"]
    monkeypatch.setattr(jobs.time, "sleep", lambda _seconds: None)
    job = jobs.ModuleJob(module="data_prep", args=())
    assert jobs.submit(executor, job) == "job"
    executor.submit.side_effect = [FailedJobError("sbatch: error: invalid account"), "job"]
    with pytest.raises(FailedJobError, match="invalid account"):
        jobs.submit(executor, job)


def test_checkpoint_submits_the_same_command_again() -> None:
    job = jobs.ModuleJob(module="data_prep", args=("build-shards", "a"))
    assert job.checkpoint().function is job


def test_a_sites_own_file_of_one_stage_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/stage1.sbatch").touch()
    assert submit.main(["stage1", "stage2_2", "--dry-run"]) == 0
    own, packages, _ = capsys.readouterr().out.splitlines()
    assert " slurm/stage1.sbatch " in own and "EVE_SLURM=" not in own
    assert f" {REPO}/slurm/stage2_2.sbatch " in packages and f"EVE_SLURM={REPO}/slurm" in packages


@pytest.mark.parametrize("module", ["data_prep", "megatron_eve.evaluation.checkpoint"])
def test_a_job_runs_programs_of_every_package(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from slurm.jobs import ModuleJob

    ran: list[str] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        ran.extend(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert ModuleJob(module=module, args=("--help",))() == 0
    assert ran[1:] == ["-m", f"megatron_eve.{module.removeprefix('megatron_eve.')}", "--help"]
