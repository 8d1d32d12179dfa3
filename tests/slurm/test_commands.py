# SPDX-License-Identifier: Apache-2.0
"""Slurm's commands while the controller is away: tried again, with growing pauses, in Slurm's own words."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from slurm import commands, owner, requeue
from slurm.commands import Answer, SlurmError
from slurm.owner import FolderTakenError
from tests.slurm.conftest import make_job

AWAY = Answer(
    code=1,
    out="",
    err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
)


class Controller:
    """Stands for Slurm: answers in their order, the last one for ever; counts time instead of spending it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.pauses: list[float] = []
        self.answers: dict[str, Iterable[Answer]] = {}
        self._now = 0.0
        monkeypatch.setattr(commands, "call", self._call)
        monkeypatch.setattr(commands.time, "sleep", self._sleep)
        monkeypatch.setattr(commands.time, "monotonic", lambda: self._now)

    def _call(self, argv: Sequence[str], *, env: dict[str, str] | None = None) -> Answer:
        line = " ".join(argv)
        self.calls.append(line)
        key = next((key for key in self.answers if key in line), None)
        return Answer(code=0, out="", err="") if key is None else next(iter(self.answers[key]))

    def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._now += seconds

    def answer(self, key: str, *answers: Answer) -> None:
        self.answers[key] = itertools.chain(answers[:-1], itertools.repeat(answers[-1]))


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    monkeypatch.setenv("EVE_SLURM_PATIENCE_S", "600")
    return Controller(monkeypatch)


def job_is(state: str) -> Answer:
    return Answer(code=0, out=f"JobId=7 {state}\n", err="")


def refused(words: str) -> Answer:
    return Answer(code=1, out="", err=f"{words}\n")


def test_it_is_tried_again_until_it_answers(controller: Controller) -> None:
    controller.answer("show job", *[AWAY] * 8, job_is("JobState=RUNNING"))
    assert commands.job_fields("7")["JobState"] == "RUNNING"
    assert controller.pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_true_cause_is_told_at_the_end(controller: Controller) -> None:
    controller.answer("update", AWAY)
    with pytest.raises(
        SlurmError, match=r"Unable to contact slurm controller .* \(\d+ tries in 600 s\)"
    ):
        commands.ask("scontrol", "update", "JobId=7")


def test_an_answer_that_stays_the_same_is_taken_at_once(controller: Controller) -> None:
    controller.answer("show job", refused("slurm_load_jobs error: Invalid job id specified"))
    assert commands.job_fields("7") == {}
    assert controller.pauses == []


def test_a_requeue_waits_for_the_controller(controller: Controller) -> None:
    controller.answer(
        "show job",
        AWAY,
        job_is("JobState=RUNNING"),
        job_is("JobState=RUNNING"),
        job_is("JobState=GONE"),
    )
    controller.answer("requeue", AWAY, Answer(code=0, out="", err=""))
    assert requeue.requeue(make_job("7"), why="test", exclude=[]) == 1
    assert controller.calls.count("scontrol requeue 7") == 2


def test_a_job_that_was_cancelled_meanwhile_is_not_brought_back(controller: Controller) -> None:
    controller.answer("show job", job_is("JobState=RUNNING"), AWAY, job_is("JobState=CANCELLED"))
    controller.answer("requeue", AWAY)
    assert requeue.requeue(make_job("7"), why="test", exclude=[]) == 1
    assert controller.calls.count("scontrol requeue 7") == 1


def test_no_requeue_is_said_at_once(
    controller: Controller, caplog: pytest.LogCaptureFixture
) -> None:
    controller.answer("requeue", refused("Requested operation is presently disabled for job 7"))
    requeue.requeue(make_job("7"), why="test", exclude=[])
    assert "presently disabled for job 7; it was submitted with --no-requeue" in caplog.text
    assert controller.pauses == []


@pytest.mark.parametrize("before", ["JobState=PENDING Reason=None", "JobState=COMPLETING"])
def test_a_held_job_is_released(controller: Controller, before: str) -> None:
    held = job_is("JobState=PENDING Reason=launch_failed_requeued_held")
    controller.answer("show job", job_is("JobState=RUNNING"), job_is(before), held)
    requeue.requeue(make_job("7"), why="test", exclude=[])
    assert controller.calls[-1] == "scontrol release 7"


def test_a_job_that_slurm_lost_starts_later(controller: Controller) -> None:
    """Else it would be started while this process still runs, and be held."""
    controller.answer("show job", AWAY, job_is("JobState=PENDING Restarts=0"))
    requeue.requeue(make_job("7"), why="test", exclude=[])
    assert controller.calls[-1] == "scontrol update JobId=7 StartTime=now+60"


def test_nodes_are_added_to_the_users_own(controller: Controller) -> None:
    controller.answer("show job", AWAY, job_is("JobState=PENDING ExcNodeList=a[1-3],b2"))
    running = refused("Job is no longer pending execution for job 7")
    controller.answer("update", running, running, Answer(code=0, out="", err=""))
    requeue.exclude_nodes(make_job("7"), ["c1", "c2"])
    assert controller.calls[-1] == "scontrol update JobId=7 ExcNodeList=a[1-3],b2,c1,c2"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("Partition=p", None),
        (
            "Partition=p ExcNodeList=n3",
            "without n1,n3 only 2 nodes remain in partition p, and it needs 3",
        ),
        ("Partition=p Features=gpu", "only 2 nodes remain"),
        ("Partition=p ReqNodeList=n1", "it asks for n1 by name"),
        ("Partition=p Reservation=r", "only 1 nodes remain"),
    ],
)
def test_nodes_that_remain_are_counted(
    controller: Controller, fields: str, words: str | None
) -> None:
    controller.answer("show job", job_is(f"JobState=RUNNING {fields}"))
    controller.answer("sinfo", Answer(code=0, out="n1 gpu,x\nn2 gpu\nn3 gpu\nn4 (null)\n", err=""))
    controller.answer(
        "show reservation", Answer(code=0, out="ReservationName=r Nodes=n[1-2]\n", err="")
    )
    controller.answer("hostnames n[1-2]", Answer(code=0, out="n1\nn2\n", err=""))
    controller.answer("hostnames n3", Answer(code=0, out="n3\n", err=""))
    controller.answer("hostnames n1", Answer(code=0, out="n1\n", err=""))
    found = requeue.too_few_nodes(make_job("7", num_nodes=3), bad=["n1"])
    assert (found is None) if words is None else (words in str(found))


def test_a_folder_waits_for_a_job_that_is_ending(controller: Controller, tmp_path: Path) -> None:
    owner.claim(tmp_path, make_job("7"))
    controller.answer("show job", AWAY, job_is("JobState=COMPLETING"), job_is("JobState=COMPLETED"))
    owner.claim(tmp_path, make_job("8"))
    assert owner.read_owner(tmp_path)["job"] == "8"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "REQUEUED"])
def test_a_folder_of_a_job_that_lives_is_refused(
    controller: Controller, tmp_path: Path, state: str
) -> None:
    owner.claim(tmp_path, make_job("7"))
    controller.answer("show job", job_is(f"JobState={state}"))
    with pytest.raises(
        FolderTakenError, match=rf"belongs to job 7 .*, {state}: wait for it, or `scancel 7`"
    ):
        owner.claim(tmp_path, make_job("8"))
    owner.claim(tmp_path, make_job("7", restart=1))


def test_a_half_written_owner_is_none(controller: Controller, tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher/job.json").write_text('{"job": "7", "clu')
    owner.claim(tmp_path, make_job("8"))
    assert owner.read_owner(tmp_path)["job"] == "8"
