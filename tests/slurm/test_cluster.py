# SPDX-License-Identifier: Apache-2.0
"""The shipped sbatch files on a real Slurm (16 emulated nodes): as they are with 128 ranks, through time-limit signal,
preemption, a node's death, cancelling, crash loops and chains, with slurm.rehearse in the trainer's place.
test_cluster_training.py does it with the trainer."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.repo.tree import commands
from tests.slurm.conftest import NODES, REPO, Cluster, saved_step, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

ONE_RANK_A_NODE = ("--ntasks-per-node=1",)


class Submission:
    """Submits a stage file with its batch log and run folder under tmp_path."""

    def __init__(self, cluster: Cluster, tmp_path: Path) -> None:
        self.cluster, self.run_dir, self.log = cluster, tmp_path / "run", tmp_path / "batch.log"

    def sbatch(self, *args: str, train: str, stage: str = "stage2_2", **env: str) -> str:
        env = {
            "RUN_DIR": str(self.run_dir),
            "TRAIN_CMD": train,
            "PYTHON": "python3",
            "EVE_MIN_FREE_GIB": "0.1",
        } | env
        argv = ("sbatch", "--parsable", f"--output={self.log}", *args, f"slurm/{stage}.sbatch")
        return self.cluster.run(*argv, env=env).strip()

    def wait_for_step(self, step: int) -> None:
        wait_until(f"step {step}", lambda: saved_step(self.run_dir) >= step)

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "no batch log"


@pytest.fixture
def submission(cluster: Cluster, tmp_path: Path) -> Submission:
    return Submission(cluster, tmp_path)


def rehearse(*, steps: int, step_s: float = 0.3) -> str:
    return f"python3 -m slurm.rehearse --steps {steps} --step-s {step_s}"


@pytest.mark.parametrize("stage", ["stage1", "stage2_1_ld", "stage2_1_hd", "stage2_2", "stage3"])
def test_slurm_accepts_the_files_as_they_are(cluster: Cluster, stage: str) -> None:
    command = ["sbatch", "--test-only", f"slurm/{stage}.sbatch"]
    result = subprocess.run(command, cwd=REPO, env=cluster.env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "node[01-16]" in result.stderr


def test_128_ranks_run_as_the_file_says(submission: Submission) -> None:
    job = submission.sbatch(train=rehearse(steps=3))
    assert submission.cluster.wait(job, timeout_s=240)["JobState"] == "COMPLETED", submission.text
    logs = sorted((submission.run_dir / "logs" / f"{job}-r0").glob("*.log"))
    assert len(logs) == 128
    seen = [re.match(r"rank (\d+)/128 on (node\d+) local (\d)", log.read_text()) for log in logs]
    assert all(seen)
    ranks = {(int(m[1]), m[2], int(m[3])) for m in seen if m}
    assert ranks == {(8 * n + g, f"node{n + 1:02d}", g) for n in range(16) for g in range(8)}


def test_readme_lines_start_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """`mkdir -p logs` and `sbatch slurm/stage2_2.sbatch ...` as the README has them, in a checkout of their own."""
    starts = ("mkdir ", "sbatch ")
    lines = [command for command in commands("README.md") if command.startswith(starts)]
    assert len(lines) == 2
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(checkout)], check=True)
    stand_in = {"TRAIN_CMD": rehearse(steps=3), "PYTHON": "python3", "EVE_MIN_FREE_GIB": "0.1"}
    env = cluster.env | stand_in
    command = ["bash", "-c", "\n".join(["set -e", *lines])]
    result = subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    (job,) = re.findall(r"Submitted batch job (\d+)", result.stdout)
    ended = cluster.wait(job, timeout_s=240)
    (log,) = (checkout / "logs").glob(f"*{job}*.log")
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert (checkout / "runs/eve7b_stage2_2/DONE").exists()


def test_time_limit_signal_requeues_and_resumes(submission: Submission) -> None:
    job = submission.sbatch(*ONE_RANK_A_NODE, train=rehearse(steps=40))
    submission.wait_for_step(5)
    submission.cluster.run(
        "scancel", "--batch", "--signal=USR2", job
    )  # what Slurm sends ahead of the limit
    ended = submission.cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), submission.text
    assert saved_step(submission.run_dir) == 40
    (first,) = re.findall(r"r0\] the ranks ended with 0, step 0 -> (\d+)", submission.text)
    assert f"step {first}, commit" in submission.text


def test_preempted_job_resumes(submission: Submission) -> None:
    job = submission.sbatch(*ONE_RANK_A_NODE, train=rehearse(steps=40))
    submission.wait_for_step(5)
    urgent = (
        "-p",
        "urgent",
        "-N16",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "srun -N16 sleep 1",
    )
    other = submission.cluster.run("sbatch", "--parsable", *urgent).strip()
    assert submission.cluster.wait(other)["JobState"] == "COMPLETED"
    ended = submission.cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), submission.text


def test_dead_node_is_left_out(submission: Submission) -> None:
    job = submission.sbatch(*ONE_RANK_A_NODE, "-N4", train=rehearse(steps=100))
    submission.wait_for_step(5)
    submission.cluster.toy("node-kill", "node03")
    try:
        ended = submission.cluster.wait(job, timeout_s=240)
    finally:
        submission.cluster.toy("node-boot", "node03")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), submission.text
    again = re.search(r"start 1 on (\S+):", submission.text)
    assert again
    assert "node03" not in submission.cluster.run("scontrol", "show", "hostnames", again[1])


def test_node_that_fails_its_check_is_left_out(submission: Submission, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$SLURMD_NODENAME$2" = node02megatron_eve.slurm.preflight ] && set -- -m slurm.preflight /none\n'
        'exec python3 "$@"\n'
    )
    python.chmod(0o755)
    own = "--exclude=node01"  # of the user, who keeps it
    job = submission.sbatch(
        *ONE_RANK_A_NODE, "-N2", own, train=rehearse(steps=3), PYTHON=str(python)
    )
    ended = submission.cluster.wait(job)
    found = (ended["JobState"], ended["ExcNodeList"])
    assert found == ("COMPLETED", "node01,node02"), submission.text
    assert "preflight: node02: cannot write into /none" in submission.text


def test_a_job_with_too_few_good_nodes_ends(submission: Submission, tmp_path: Path) -> None:
    """Excluded, it would be pending for ever."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        '[ "$SLURMD_NODENAME$2" = node02megatron_eve.slurm.preflight ] && set -- -m slurm.preflight /none\n'
        'exec python3 "$@"\n'
    )
    python.chmod(0o755)
    job = submission.sbatch(*ONE_RANK_A_NODE, f"-N{NODES}", train="true", PYTHON=str(python))
    ended = submission.cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), submission.text
    assert (
        f"only {int(NODES) - 1} nodes remain in partition main, and it needs {NODES}"
        in submission.text
    )


def test_requeues_from_outside_are_no_failures(submission: Submission, tmp_path: Path) -> None:
    """Twice while the ranks still start; the failure after it is the first."""
    slow = tmp_path / "slow.sh"
    slow.write_text('#!/bin/bash\nexec -a "slow $*" sleep 600\n')
    slow.chmod(0o755)
    job = submission.sbatch(*ONE_RANK_A_NODE, "-N1", train=str(slow))
    mine = ["pgrep", "-f", f"^slow .*run_dir={submission.run_dir}"]

    def ranks() -> list[str]:
        return subprocess.run(mine, text=True, capture_output=True).stdout.split()

    for start in range(3):
        wait_until(f"start {start}", lambda s=start: f"start {s} on" in submission.text)  # type: ignore[misc]
        wait_until("the rank runs", ranks)
        if start < 2:
            submission.cluster.run("scontrol", "requeue", job)
    subprocess.run(["kill", "-KILL", *ranks()], check=True)
    wait_until("start 3", lambda: "start 3 on" in submission.text)
    assert "requeue: rank 0 on" in submission.text


def test_a_second_job_in_the_folder_changes_nothing(submission: Submission, tmp_path: Path) -> None:
    first = submission.sbatch(*ONE_RANK_A_NODE, "-N1", train=rehearse(steps=60))
    submission.wait_for_step(5)
    second = submission.sbatch(
        *ONE_RANK_A_NODE, "-N1", f"--output={tmp_path}/second.log", train=rehearse(steps=60)
    )
    assert submission.cluster.wait(second)["JobState"] == "FAILED"
    assert f"belongs to job {first} (stage2_2 of root" in (tmp_path / "second.log").read_text()
    ended = submission.cluster.wait(first)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), submission.text


def test_ranks_need_nothing_of_the_submitting_shell(submission: Submission, tmp_path: Path) -> None:
    """A site that submits with an empty environment, a folder with a space; all that counts stands on the line."""
    folder = tmp_path / "a run"
    argv = ["sbatch", "--parsable", *ONE_RANK_A_NODE, "-N2", f"--output={submission.log}"]
    argv += ["--export=PATH", "slurm/stage1.sbatch", "eve_tiny_stage1", f"run_dir={folder}"]
    argv += [f"TRAIN_CMD={rehearse(steps=3)}", "PYTHON=python3", "EVE_MIN_FREE_GIB=0.1"]
    job = submission.cluster.run(*argv).strip()
    assert submission.cluster.wait(job)["JobState"] == "COMPLETED", submission.text
    assert saved_step(folder) == 3
    assert "eve_tiny_stage1" in submission.text


def test_crash_loop_gives_up(submission: Submission) -> None:
    job = submission.sbatch(*ONE_RANK_A_NODE, "-N2", train="false")
    ended = submission.cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), submission.text


def test_scancel_is_final(submission: Submission) -> None:
    job = submission.sbatch(*ONE_RANK_A_NODE, "-N2", train=rehearse(steps=1000))
    submission.wait_for_step(5)
    submission.cluster.run("scancel", job)
    ended = submission.cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), submission.text
    wait_until(
        "not requeued",
        lambda: "PENDING" not in submission.cluster.job(job)["JobState"],
        timeout_s=10,
    )


def submit_chain(cluster: Cluster, root: Path, *stages: str, train: str, **env: str) -> list[str]:
    argv = [
        "python3",
        "-m",
        "slurm.submit",
        *stages,
        "--root",
        str(root),
        "--sbatch-arg=--ntasks-per-node=1",
    ]
    argv += [f"--sbatch-arg=--output={root}/%x.log"]
    env = {"TRAIN_CMD": train, "PYTHON": "python3", "EVE_MIN_FREE_GIB": "0.1"} | env
    lines = cluster.run(*argv, env=env).splitlines()
    return [line.split()[1] for line in lines[:-1]]


def test_chain_holds_through_a_requeue(cluster: Cluster, tmp_path: Path) -> None:
    stages = ("stage1", "stage2_1_ld", "stage2_2")
    ids = submit_chain(cluster, tmp_path, *stages, train=rehearse(steps=15))
    second = tmp_path / "eve7b_stage2_1_ld"
    wait_until("second stage runs", lambda: saved_step(second) >= 5)
    cluster.run("scancel", "--batch", "--signal=USR2", ids[1])
    assert cluster.wait(ids[2], timeout_s=240)["JobState"] == "COMPLETED"
    assert cluster.job(ids[1])["Restarts"] == "1"
    assert all((tmp_path / f"eve7b_{stage}" / "DONE").exists() for stage in stages)


def test_chain_ends_at_a_failure(cluster: Cluster, tmp_path: Path) -> None:
    ids = submit_chain(
        cluster,
        tmp_path,
        "stage1",
        "stage2_1_ld",
        "stage2_2",
        train="false",
        EVE_MAX_NO_PROGRESS="1",
    )
    assert [cluster.wait(job)["JobState"] for job in ids] == ["FAILED", "CANCELLED", "CANCELLED"]
