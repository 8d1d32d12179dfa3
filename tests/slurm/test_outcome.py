# SPDX-License-Identifier: Apache-2.0
"""Why ranks ended, by the messages that Slurm 22.05 prints."""

import pytest

from slurm.outcome import End, judge, tasks_of

ENDING = """srun: launch/slurm: _step_signal: Terminating StepId=1.1
slurmstepd-node01: error: *** STEP 1.1 ON node01 CANCELLED AT 2026-12-01T03:04:43 ***
srun: error: node01: tasks 0-1,3: Terminated
srun: Force Terminated StepId=1.1
"""


def cause(text: str, *, code: int = 143, **state: bool) -> End:
    known = {"is_done": False, "asked": False, "killed": False, "moved": False} | state
    return judge(code=code, text=text, **known).end


@pytest.mark.parametrize(
    ("first", "end"),
    [
        ("srun: error: node02: task 2: Exited with exit code 1", End.RANK),
        ("srun: error: node02: task 2: Killed", End.RANK),
        ("srun: error: node02: task 2: Out Of Memory", End.RANK),
        ("srun: error: node02: task 2: Segmentation fault (core dumped)", End.RANK),
        ("srun: error: node02: task 2: Exited with exit code 2", End.CONFIG),
        ("srun: error: node02: task 2: Terminated", End.OUTSIDE),
        ("srun: error: node02: task 2: User defined signal 2", End.OUTSIDE),
        ("srun: error: node02: task 2: Exited with exit code 143", End.OUTSIDE),
        ("srun: error: Node failure on node02", End.NODE),
    ],
)
def test_the_first_to_fall_is_the_cause(first: str, end: End) -> None:
    """srun's own code is that of the ranks which it ended after the first."""
    assert cause(f"{first}\n{ENDING}") is end


def test_exit_code_2_counts_whoever_else_failed_first() -> None:
    first = "srun: error: node01: task 0: Exited with exit code 1\n"
    assert cause(first + "srun: error: node02: task 1: Exited with exit code 2\n") is End.CONFIG


@pytest.mark.parametrize(
    "text",
    [
        "srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)",
        "srun: error: Unable to confirm allocation for job 7: Socket timed out on send/recv operation",
        "srun: error: Task launch for StepId=7.1 failed on node node02: Communication connection failure",
        "srun: error: Application launch failed: Invalid job credential",
    ],
)
def test_slurm_could_not_start_the_ranks(text: str) -> None:
    assert cause(text, code=1) is End.SLURM


def test_a_signal_that_was_asked_for_is_no_failure() -> None:
    assert cause(ENDING, asked=True) is End.STOPPED
    assert cause("srun: error: node02: task 2: Killed", asked=True) is End.STOPPED
    assert cause("", code=0, asked=True) is End.STOPPED


def test_ranks_that_hang_or_fail_while_they_stop_are_a_failure() -> None:
    assert cause("srun: error: node01: tasks 0-3: Killed", asked=True, killed=True) is End.HANG
    assert cause("srun: error: node01: task 0: Exited with exit code 1", asked=True) is End.RANK


def test_done_is_done_whatever_came_after_it() -> None:
    found = judge(
        code=137,
        text="srun: error: n: task 3: Killed",
        is_done=True,
        asked=False,
        killed=False,
        moved=True,
    )
    assert found.end is End.DONE
    assert "ended with 137 after it" in found.why


def test_exit_code_0_without_done() -> None:
    """After a step: a preemption that only the ranks heard. Without one: nothing that another start would change."""
    assert cause("", code=0, moved=True) is End.OUTSIDE
    assert cause("", code=0) is End.RANK


def test_a_failure_without_a_word_is_the_ranks() -> None:
    assert cause("", code=1) is End.RANK
    assert cause("", code=2) is End.CONFIG


def test_ranks_are_read_from_their_ranges() -> None:
    (task,) = tasks_of("srun: error: node01: tasks 0-2,5: Exited with exit code 3\n")
    assert (task.node, task.ranks, task.code) == ("node01", (0, 1, 2, 5), 3)
