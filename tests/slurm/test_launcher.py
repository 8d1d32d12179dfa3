# SPDX-License-Identifier: Apache-2.0
"""The sbatch file, launcher, preflight and rehearsal together, with stubs for srun and scontrol and two ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.launcher import rendezvous
from tests.slurm.conftest import StubSlurm, make_job, saved_step, wait_until

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


def test_arguments_win_over_the_environment(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    """Folder with a space and a per cent sign, trainer with a quoted word."""
    folder = tmp_path / "an other %t run"
    link = tmp_path / "a python"
    link.symlink_to(sys.executable)
    train = f"'{link}' -m slurm.rehearse --steps 4 --step-s 0"
    words = ("eve_tiny_stage1", f"run_dir={folder}", f"TRAIN_CMD={train}", "optim.peak_lr=1e-5")
    process = stub_slurm.sbatch_file(*words, RECIPE="eve_tiny_stage3", EVE_PROFILE="")
    text = output(process)
    assert process.returncode == 0, text
    assert (folder / "DONE").read_text() == "4\n"
    assert not (stub_slurm.run_dir / "DONE").exists()
    ranks = next(call for call in stub_slurm.calls if "rank.sh" in call)
    assert ranks.endswith(f"eve_tiny_stage1 run_dir={folder} optim.peak_lr=1e-5")
    assert f"--output={tmp_path}/an other %%t run/logs/4711-r0/%t.log" in ranks


@pytest.mark.parametrize("word", ["peak_lr=1", "run_dir=", "", "one two=3"])
def test_an_argument_that_is_not_understood_is_refused(stub_slurm: StubSlurm, word: str) -> None:
    process = stub_slurm.sbatch_file(word)
    assert f"found '{word}', expected RECIPE" in output(process)
    assert process.returncode == 2
    assert stub_slurm.calls == []


def test_every_srun_hands_on_the_environment(stub_slurm: StubSlurm) -> None:
    """Under sbatch --export=NONE srun would hand on nothing, not even MASTER_ADDR."""
    assert stub_slurm.sbatch_file().wait(timeout=60) == 0
    sruns = [call for call in stub_slurm.calls if call.startswith("srun ")]
    assert len(sruns) == 2
    assert all("--export=ALL" in call for call in sruns)


def test_a_configuration_error_is_final_before_any_node_is_asked(stub_slurm: StubSlurm) -> None:
    train = f"{sys.executable} -m megatron_eve.train"
    process = stub_slurm.sbatch_file("optim.peek_lr=1", TRAIN_CMD=train)
    text = output(process)
    assert "configuration error, final: optim.peek_lr is not a field" in text
    assert process.returncode == 2
    assert stub_slurm.calls == []


def test_exit_code_2_of_a_rank_is_final(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    refusing = tmp_path / "refusing.sh"
    refusing.write_text("#!/bin/bash\nexit 2\n")
    refusing.chmod(0o755)
    process = stub_slurm.sbatch_file(TRAIN_CMD=str(refusing))
    assert "configuration error, final" in output(process)
    assert process.returncode == 2
    assert not requeued(stub_slurm)


def test_requeue_is_tried_until_the_controller_is_back(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="false", STUB_AWAY="2", EVE_SLURM_PATIENCE_S="60")
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert text.count("not requeued yet: slurm_requeue error: Unable to contact slurm") == 2
    assert stub_slurm.calls.count("scontrol requeue 4711") == 3


def test_ranks_are_started_again_where_slurm_could_not(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(STUB_NO_STEP="2", EVE_SLURM_PATIENCE_S="60")
    text = output(process)
    assert process.returncode == 0, text
    assert "Slurm could not start the ranks: srun: error: Unable to create step" in text


def wait_for_ranks(pids: Path) -> None:
    wait_until("both ranks run", lambda: pids.exists() and len(pids.read_text().split()) == 2)


def test_requeues_from_outside_do_not_count(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    """Two starts that Slurm ends while the ranks still import, then a failure: it is the first one."""
    slow = tmp_path / "slow.sh"
    slow.write_text('#!/bin/bash\necho $$ >> "$RUN_DIR/pids"; exec sleep 100\n')
    slow.chmod(0o755)
    for restart in ("0", "1"):
        process = stub_slurm.sbatch_file(TRAIN_CMD=str(slow), SLURM_RESTART_COUNT=restart)
        pids = stub_slurm.run_dir / "pids"
        wait_for_ranks(pids)
        process.kill()
        process.wait()
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        pids.unlink()
    process = stub_slurm.sbatch_file(TRAIN_CMD="false", SLURM_RESTART_COUNT="2")
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert requeued(stub_slurm)


def test_a_second_job_in_the_folder_refuses_and_touches_nothing(stub_slurm: StubSlurm) -> None:
    first = stub_slurm.sbatch_file(TRAIN_CMD="python3 -m slurm.rehearse --step-s 0.1 --steps 9999")
    wait_until("step 5", lambda: saved_step(stub_slurm.run_dir) >= 5)
    before = (stub_slurm.run_dir / "launcher/starts.jsonl").read_text()
    second = stub_slurm.sbatch_file(SLURM_JOB_ID="4712")
    text = output(second)
    assert second.returncode == 1
    assert "belongs to job 4711 (stage2_2 of" in text
    assert not (stub_slurm.run_dir / "STOP").exists()
    assert (stub_slurm.run_dir / "launcher/starts.jsonl").read_text() == before
    step = saved_step(stub_slurm.run_dir)
    wait_until("the first goes on", lambda: saved_step(stub_slurm.run_dir) > step)
    first.send_signal(signal.SIGUSR2)
    assert first.wait(timeout=60) == KILLED_BY_SLURM


def test_a_job_that_has_ended_leaves_its_folder(stub_slurm: StubSlurm) -> None:
    assert stub_slurm.sbatch_file(TRAIN_CMD="true", STUB_REFUSE="1").wait(timeout=60) == 1
    second = stub_slurm.sbatch_file(SLURM_JOB_ID="4712", STUB_STATE="FAILED")
    assert "belonged to job 4711" in output(second)
    assert second.returncode == 0


def test_done_run_starts_nothing(stub_slurm: StubSlurm) -> None:
    (stub_slurm.run_dir / "DONE").write_text("10\n")
    assert stub_slurm.sbatch_file().wait(timeout=60) == 0
    assert stub_slurm.calls == []


@pytest.mark.parametrize("text", ["", "7\n"])
def test_done_of_fewer_steps_or_half_written_is_trained_on(
    stub_slurm: StubSlurm, text: str
) -> None:
    (stub_slurm.run_dir / "DONE").write_text(text)
    (stub_slurm.run_dir / "latest_step").write_text("7")
    process = stub_slurm.sbatch_file()
    assert "the trainer goes on and decides" in output(process)
    assert process.returncode == 0
    assert (stub_slurm.run_dir / "DONE").read_text() == "10\n"


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
    lines = [json.loads(line) for line in starts]
    assert [line["step"] for line in lines if "end" not in line] == [0, stopped_at]
    assert [line["end"] for line in lines if "end" in line] == ["stopped on request", "done"]


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
    assert "3 starts failed at step 0 by the ranks' own fault; EVE_MAX_NO_PROGRESS=3" in text


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


def test_a_job_that_cannot_be_requeued_says_so_at_its_start(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(STUB_STATE="RUNNING Requeue=0")
    assert "submitted with --no-requeue: what does not end the run ends the job" in output(process)


def test_refused_requeue_is_said(stub_slurm: StubSlurm) -> None:
    process = stub_slurm.sbatch_file(TRAIN_CMD="true", STUB_REFUSE="1")
    assert "job 4711 could not be requeued in" in output(process)
    assert process.returncode == 1
    assert stub_slurm.calls.count("scontrol requeue 4711") > 1


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


def spoil_node02(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\nif [ "$SLURMD_NODENAME" = node02 ]; then set -- "${@/$RUN_DIR/\\/proc\\/nowhere}"; fi\n'
        'exec python3 "$@"\n'
    )
    python.chmod(0o755)
    srun = Path(stub_slurm.env["PATH"].split(":")[0]) / "srun"
    text = srun.read_text().replace('"$@" &', f'"{python}" "${{@:2}}" &')
    srun.write_text(text)


def test_bad_node_is_excluded_beside_the_users_own(stub_slurm: StubSlurm, tmp_path: Path) -> None:
    """One node of two cannot write: it is named, excluded, and the job goes back to the queue."""
    spoil_node02(stub_slurm, tmp_path)
    state = "RUNNING ExcNodeList=node07 Partition=main"  # the user's own --exclude
    nodes = "node01 node02 node03 node07"
    process = stub_slurm.sbatch_file(STUB_KEEP="1", STUB_STATE=state, STUB_NODES=nodes)
    text = output(process)
    assert process.returncode == KILLED_BY_SLURM, text
    assert "preflight: node02: cannot write into /proc/nowhere" in text
    assert "scontrol update JobId=4711 ExcNodeList=node07,node02" in stub_slurm.calls
    assert not any("rank.sh" in call for call in stub_slurm.calls)


def test_a_job_with_too_few_nodes_left_ends_and_says_so(
    stub_slurm: StubSlurm, tmp_path: Path
) -> None:
    spoil_node02(stub_slurm, tmp_path)
    state = "RUNNING ExcNodeList=node07 Partition=main"
    process = stub_slurm.sbatch_file(STUB_STATE=state, STUB_NODES="node01 node02 node07")
    text = output(process)
    assert process.returncode == 1, text
    assert "without node02,node07 only 1 nodes remain in partition main, and it needs 2" in text
    assert not requeued(stub_slurm)


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


def test_ports_of_neighbouring_jobs_differ_and_are_not_ephemeral() -> None:
    ports = [int(rendezvous(make_job(str(n)), ["node01"])["MASTER_PORT"]) for n in range(12000)]
    assert len(set(ports)) == 12000
    assert min(ports) >= 20000
    assert max(ports) < 32768
