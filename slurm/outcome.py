# SPDX-License-Identifier: Apache-2.0
"""Why the ranks of a start ended: by their own fault, or by somebody else's.

In: srun's exit code and its own messages, which name each task that did not end well, and whether this process had
asked the ranks to stop. Out: the cause, which decides what is counted (slurm/launcher.py): only a rank's own failure
counts towards giving up. srun's exit code alone means little: after the first failure it ends the other ranks, and
the code becomes that of their signal.
"""

import re
import signal
from dataclasses import dataclass, field
from enum import Enum

from .commands import is_away

CONFIG_EXIT_CODE = 2
"""Wrong usage or configuration; the next start would fail alike."""

TASK = re.compile(r"^srun: error: (\S+): tasks? ([0-9,\-]+): (.+?)\s*$", re.M)
NODE = re.compile(r"Node failure on (\S+)")
NOT_STARTED = (
    "Unable to create step",
    "Unable to create job step",
    "Task launch for",
    "Application launch failed",
    "launch failed",
    "Job credential expired",
)
FROM_OUTSIDE = ("Terminated", "User defined signal 2", "Hangup")
"""A rank that still starts has no handler yet: a signal of a preemption or a requeue ends it."""


class End(Enum):
    """The cause, as starts.jsonl has it."""

    DONE = "done"
    STOPPED = "stopped on request"
    RANK = "a rank failed"
    HANG = "the ranks hung"
    CONFIG = "configuration error"
    NODE = "a node failed"
    SLURM = "Slurm could not start the ranks"
    OUTSIDE = "ended from outside"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A cause, in words for the log, and the ranks to look at."""

    end: End
    why: str
    ranks: tuple[int, ...] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One line of srun about tasks that did not end well."""

    node: str
    ranks: tuple[int, ...]
    text: str

    @property
    def code(self) -> int | None:
        match = re.search(r"exit code (\d+)", self.text)
        return int(match[1]) if match else None

    @property
    def said(self) -> str:
        ranks = ",".join(map(str, self.ranks[:8])) + (",..." if len(self.ranks) > 8 else "")
        return f"rank {ranks} on {self.node}: {self.text}"


def tasks_of(text: str) -> list[Task]:
    """srun's lines about tasks, in their order."""
    return [
        Task(node=m[1], ranks=_numbers(m[2]), text=m[3])
        for m in TASK.finditer(text)
        if not m[3].startswith("Exited with exit code 0")
    ]


def judge(
    *, code: int, text: str, is_done: bool, asked: bool, killed: bool, moved: bool
) -> Outcome:
    """The cause. `is_done`: this start wrote DONE. `asked`: this process asked the ranks to stop; `killed`: and killed
    them because they did not. `moved`: a step was saved since the start."""
    if is_done:
        note = f"; the ranks ended with {code} after it, see their logs" if code else ""
        return Outcome(end=End.DONE, why=f"done{note}")
    tasks = tasks_of(text)
    wrong = next((task for task in tasks if task.code == CONFIG_EXIT_CODE), None)
    if wrong is not None or (code == CONFIG_EXIT_CODE and not tasks):
        ranks = wrong.ranks if wrong else (0,)
        why = wrong.said if wrong else f"the ranks ended with {code}"
        return Outcome(end=End.CONFIG, why=why, ranks=ranks)
    if killed:
        return Outcome(end=End.HANG, why="the ranks did not stop when asked and were killed")
    own = next((task for task in tasks if not _is_foreign(task, asked=asked)), None)
    if node := NODE.search(text):
        return Outcome(end=End.NODE, why=f"node {node[1]} failed")
    if own is not None:
        return Outcome(end=End.RANK, why=own.said, ranks=own.ranks)
    if asked:
        return Outcome(end=End.STOPPED, why="stopped before the end")
    if code and not tasks and (is_away(text) or any(words in text for words in NOT_STARTED)):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return Outcome(end=End.SLURM, why=" / ".join(lines[-3:]))
    if tasks:
        return Outcome(end=End.OUTSIDE, why=f"ended from outside ({tasks[0].said})")
    if code == 0 and moved:
        return Outcome(end=End.OUTSIDE, why="stopped before the end")
    if code == 0:
        return Outcome(
            end=End.RANK, why="the ranks ended with 0 without a step and without DONE", ranks=(0,)
        )
    return Outcome(end=End.RANK, why=f"failed with {code}", ranks=(0,))


def _is_foreign(task: Task, *, asked: bool) -> bool:
    """Whether a signal from outside ended it. SIGKILL is a rank's own failure, out of memory mostly, unless Slurm is
    ending the job: then it follows SIGTERM."""
    if task.code is not None:
        return task.code in (128 + signal.SIGTERM, 128 + signal.SIGUSR2)
    text = task.text.partition(" (")[0]
    return text in FROM_OUTSIDE or (asked and text == "Killed")


def _numbers(text: str) -> tuple[int, ...]:
    """`0-2,5` as numbers."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found += range(int(first), int(last or first) + 1)
    return tuple(found)
