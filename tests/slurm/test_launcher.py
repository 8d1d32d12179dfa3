# SPDX-License-Identifier: Apache-2.0
"""The sbatch file, launcher, preflight and rehearsal together, with stubs for srun and scontrol and two ranks."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from slurm.launcher import Job, RunFolder, rendezvous
from tests.slurm.conftest import StubSlurm, saved_step, wait_until

KILLED_BY_SLURM = (
    -signal.SIGKILL
)  # the stub of `scontrol requeue` ends the batch script as Slurm does


def output(process: "subprocess.Popen[str]") -> str:
    return process.communicate(timeout=60)[0]


def requeued(stub: StubSlurm) -> bool:
    return "scontrol requeue 4711" in stub.calls


def test_runs_to_the_end(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file("optim.peak_lr=1e-5")
    text = output(process)
    assert process.returncode == 0, text
    assert (stub_slurm.run_dir / "DONE").exists()
    assert saved_step(stub_slurm.run_dir) == 10
    assert not requeued(stub_slurm)
    train = next(call for call in stub_slurm.calls if "rank.sh" in call)
    assert train.endswith(f"eve7b_stage2_2 run_dir={stub_slurm.run_dir} optim.peak_lr=1e-5")
    assert "--kill-on-bad-exit=1" in train
    assert "done" in text.splitlines()[-1]


def test_recipe_comes_from_the_environment(stub_slurm: StubSlurm) -> None:
    assert stub_slurm.sbatch_file(RECIPE="eve_tiny_stage2_2").wait(timeout=60) == 0
    assert any("eve_tiny_stage2_2" in call for call in stub_slurm.calls)


def test_done_run_starts_nothing(stub_slurm: StubSlurm) -> None:
    (stub_slurm.run_dir / "DONE").touch()
    assert stub_slurm.sbatch_file().wait(timeout=60) == 0
    assert stub_slurm.calls == []


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signal_saves_and_requeues_then_resumes(
    stub_slurm: StubSlurm, number: signal.Signals
) -> None:
    slow = "python3 -m slurm.rehearse --step-s 0.1 --steps 40"
    process = stub_slurm.sbatch_file(TRAIN_CMD=slow)
    wait_until("step 5", lambda: saved_step(stub_slurm.run_dir) >= 5)
    process.send_signal(number)
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert requeued(stub_slurm)
    assert 5 <= saved_step(stub_slurm.run_dir) < 40
    assert not (stub_slurm.run_dir / "DONE").exists()

    stopped_at = saved_step(stub_slurm.run_dir)
    again = stub_slurm.sbatch_file(SLURM_RESTART_COUNT="1")
    text = output(again)
    assert again.returncode == 0, text
    assert f"step {stopped_at}" in text
    assert not (stub_slurm.run_dir / "STOP").exists()
    starts = (stub_slurm.run_dir / "launcher/starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, stopped_at]


def test_hanging_ranks_are_killed_and_requeued(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    """Ranks that ignore the signal and the STOP file, as in a collective that hangs."""
    hanging = tmp_path / "hanging.sh"
    hanging.write_text(
        '#!/bin/bash\ntrap "" USR2 TERM\n'
        'echo $$ >> "$RUN_DIR/pids"; echo 7 > "$RUN_DIR/latest_step"; exec sleep 100\n'
    )
    hanging.chmod(0o755)
    process = stub_slurm.sbatch_file(TRAIN_CMD=str(hanging), EVE_STOP_GRACE_S="1")
    wait_until("both ranks run", lambda: (stub_slurm.run_dir / "pids").exists())
    process.send_signal(signal.SIGUSR2)
    text = output(process)
    assert "did not stop within EVE_STOP_GRACE_S=1: killing them" in text
    assert "scancel --signal=KILL 4711" in stub_slurm.calls
    assert process.returncode == KILLED_BY_SLURM, text
    assert requeued(stub_slurm)


def test_exit_code_0_without_done_is_not_success(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="true")
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert requeued(stub_slurm)


def test_crash_loop_ends(stub_slurm: StubSlurm) -> None:
    codes = []
    for restart in range(3):
        process = stub_slurm.sbatch_file(TRAIN_CMD="false", SLURM_RESTART_COUNT=str(restart))
        text = output(process)
        codes.append(process.returncode)
    assert codes == [KILLED_BY_SLURM, KILLED_BY_SLURM, 1]
    assert "3 starts ended at step 0; EVE_MAX_NO_PROGRESS=3" in text


def test_failures_with_progress_go_on(stub_slurm: StubSlurm) -> None:
    for restart in range(4):
        fail_at = 5 * (restart + 1) + 1
        command = f"python3 -m slurm.rehearse --step-s 0 --steps 100 --fail-at {fail_at}"
        process = stub_slurm.sbatch_file(TRAIN_CMD=command, SLURM_RESTART_COUNT=str(restart))
        output(process)
        assert process.returncode == KILLED_BY_SLURM
    assert saved_step(stub_slurm.run_dir) == 20


def test_restarts_are_limited(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(
        TRAIN_CMD="false", SLURM_RESTART_COUNT="2", EVE_MAX_RESTARTS="2"
    )
    assert "EVE_MAX_RESTARTS=2 is used up" in output(process)
    assert process.returncode == 1
    assert not requeued(stub_slurm)


def test_cancelled_job_stays_cancelled(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="true", STUB_STATE="COMPLETING Reason=None")
    assert "Slurm is ending the job by itself, JobState=COMPLETING" in output(process)
    assert process.returncode == 1
    assert not requeued(stub_slurm)


def test_timed_out_job_is_requeued(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="true", STUB_STATE="COMPLETING Reason=TimeLimit")
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert requeued(stub_slurm)


def test_refused_requeue_is_said(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="true", STUB_REFUSE="1")
    assert "Slurm refused to requeue job 4711" in output(process)
    assert process.returncode == 1


def test_stop_file_of_a_person_is_respected(stub_slurm: StubSlurm) -> None:
    slow = "python3 -m slurm.rehearse --step-s 0.1 --steps 100"
    process = stub_slurm.sbatch_file(TRAIN_CMD=slow)
    wait_until("step 5", lambda: saved_step(stub_slurm.run_dir) >= 5)
    (stub_slurm.run_dir / "STOP").touch()
    assert "not requeued" in output(process)
    assert process.returncode == 1
    assert not requeued(stub_slurm)
    again = stub_slurm.sbatch_file()
    assert "remove it to train on" in output(again)
    assert again.returncode == 1


def test_bad_node_is_excluded(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    """One node of two cannot write: it is named, excluded, and the job goes back to the queue."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nif [ "$SLURMD_NODENAME" = node02 ]; then set -- "${@/$RUN_DIR/\\/nowhere}"; fi\n'
        'exec python3 "$@"\n'
    )
    python.chmod(0o755)
    srun = Path(stub_slurm.env["PATH"].split(":")[0]) / "srun"
    text = srun.read_text().replace('"$@" &', f'"{python}" "${{@:2}}" &')
    srun.write_text(text)
    process = stub_slurm.sbatch_file(STUB_KEEP="1")
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert "preflight: node02: cannot write into /nowhere" in text
    assert "scontrol update JobId=4711 ExcNodeList=node02" in stub_slurm.calls
    assert not any("rank.sh" in call for call in stub_slurm.calls)


def test_trouble_on_most_nodes_is_not_the_nodes(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(EVE_MIN_FREE_GIB="1e9")
    text = output(process)
    assert process.returncode == 1
    assert "preflight failed on 2 of 2 nodes" in text
    assert "GiB are free in" in text
    assert not requeued(stub_slurm)


def test_outside_of_slurm_it_says_so(stub_slurm: StubSlurm) -> None:
    env = {k: v for k, v in stub_slurm.env.items() if k != "SLURM_NNODES"}
    command = [env["PYTHON"], "-m", "slurm.launcher", str(stub_slurm.run_dir), "--", "true"]
    result = subprocess.run(
        command, env=env, text=True, capture_output=True, cwd=env["SLURM_SUBMIT_DIR"]
    )
    assert result.returncode == 2
    assert "found no 'SLURM_NNODES' in the environment" in result.stdout


def make_job(job_id: str) -> Job:
    return Job(
        job_id=job_id,
        restart=0,
        node_list="a",
        num_nodes=1,
        num_tasks=8,
        max_restarts=1,
        max_no_progress=1,
        stop_grace_s=1,
    )


def test_ports_of_neighbouring_jobs_differ_and_are_not_ephemeral() -> None:
    ports = [int(rendezvous(make_job(str(n)), ["node01"])["MASTER_PORT"]) for n in range(12000)]
    assert len(set(ports)) == 12000
    assert min(ports) >= 20000
    assert max(ports) < 32768


def test_starts_of_other_jobs_do_not_count(tmp_path: Path) -> None:
    folder = RunFolder(path=tmp_path)
    (tmp_path / "launcher").mkdir()
    folder.record_start(make_job("1"))
    folder.record_start(make_job("1"))
    assert folder.starts_without_progress(make_job("1")) == 2
    assert folder.starts_without_progress(make_job("2")) == 0
    (tmp_path / "latest_step").write_text("3")
    assert folder.starts_without_progress(make_job("1")) == 0
