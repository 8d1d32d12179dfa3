# SPDX-License-Identifier: Apache-2.0
"""The files of RUN_DIR through which launcher and trainer talk, and what the launcher knows of earlier starts.

  latest_step  last saved step as text (trainer writes)
  DONE         number of the last step, once it is done and saved (trainer writes)
  STOP         all ranks stop after the same step; the launcher's own holds `requeue JOB`, a person's any other text
  launcher/    starts.jsonl: a line as a start begins, and one as it ends, with the cause

A crash or a full disk leaves files empty or half-written. A file that cannot be read counts as not written; files are
written here whole or not at all; and no start ends because a note of it could not be kept.
"""

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.run_files import DONE_FILE, LATEST_STEP_FILE, STOP_FILE, checkpoints_of
from megatron_eve.whole import write_text

from .job import Job
from .outcome import End

LAUNCHER_STOP = "requeue"
"""First word of a STOP file that a launcher wrote; any other text is a person's wish."""

STARTS_FILE = "launcher/starts.jsonl"

log = logging.getLogger("slurm.launcher")


def read_text(path: Path) -> str:
    """The file's text; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def read_step(path: Path) -> int | None:
    """The number that a file holds; None if it is missing or half-written."""
    text = read_text(path).strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One start of a job, from starts.jsonl."""

    restart: int
    first_step: int
    end: str | None  # None: it was ended from outside, and nothing was left to write it


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's folder, as the launcher sees it."""

    path: Path

    @property
    def done_step(self) -> int | None:
        """Steps after which the run was done; None before."""
        return read_step(self.path / DONE_FILE)

    @property
    def step(self) -> int:
        """Last saved step; 0 before the first checkpoint."""
        step = read_step(self.path / LATEST_STEP_FILE)
        return max(checkpoints_of(self.path), default=0) if step is None else step

    @property
    def stopped_by_person(self) -> bool:
        stop = self.path / STOP_FILE
        first = (read_text(stop).split() or [""])[0]
        return stop.exists() and not (first and LAUNCHER_STOP.startswith(first))

    def write_stop(self, job: Job) -> None:
        """Ask the ranks to stop; a person's STOP stays as it is, and if none can be written the signal must do."""
        if (self.path / STOP_FILE).exists():
            return
        try:
            write_text(self.path / STOP_FILE, f"{LAUNCHER_STOP} {job.job_id}\n")
        except OSError as error:
            log.error("cannot write %s/STOP (%s): the ranks get the signal only", self.path, error)

    def clear_own_stop(self) -> None:
        """Remove the STOP file of this start or one before it."""
        if not self.stopped_by_person:
            (self.path / STOP_FILE).unlink(missing_ok=True)

    def record_start(self, job: Job, *, commit: str) -> None:
        """Note that this start begins."""
        self._record(job, step=self.step, nodes=job.node_list, commit=commit)

    def record_end(self, job: Job, *, end: End, code: int, why: str) -> None:
        """Note how it ended; a start without this line was ended from outside."""
        self._record(job, end=end.value, step=self.step, code=code, why=why)

    def _record(self, job: Job, **values: object) -> None:
        line = {"job": job.job_id, "restart": job.restart, **values}
        line["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file = self.path / STARTS_FILE
        try:
            before = "" if read_text(file)[-1:] in ("", "\n") else "\n"  # half a line stays alone
            with file.open("a", encoding="utf-8") as stream:
                stream.write(before + json.dumps(line) + "\n")
        except OSError as error:
            log.error("cannot write %s (%s): this start will not be counted", file, error)

    def attempts(self, job: Job) -> list[Attempt]:
        """The starts of this job, this one included; lines of another job, cluster or format are left out."""
        found: dict[int, Attempt] = {}
        for line in read_text(self.path / STARTS_FILE).splitlines():
            values = _object(line)
            restart, step = values.get("restart"), values.get("step")
            if values.get("job") != job.job_id or type(restart) is not int or type(step) is not int:
                continue
            if "end" in values:
                if restart in found:
                    first = found[restart].first_step
                    found[restart] = Attempt(
                        restart=restart, first_step=first, end=str(values["end"])
                    )
                continue
            if restart == 0:  # ids begin again when a cluster is set up anew
                found = {}
            found[restart] = Attempt(restart=restart, first_step=step, end=None)
        return [attempt for attempt in found.values() if attempt.restart <= job.restart]

    def failures_without_progress(self, job: Job) -> int:
        """How many of this job's starts failed by a rank's own fault and began at the step where the run still is."""
        ends = {End.RANK.value, End.HANG.value}
        step = self.step
        return sum(a.end in ends and a.first_step >= step for a in self.attempts(job))

    def requeues_by_trouble(self, job: Job) -> int:
        """Requeues of this job other than for a time limit, a preemption or a user's wish."""
        calm = {None, End.STOPPED.value, End.OUTSIDE.value}
        before = [a for a in self.attempts(job) if a.restart < job.restart]
        return job.restart - sum(a.end in calm for a in before)


def _object(line: str) -> dict[str, object]:
    try:
        values = json.loads(line)
    except ValueError:
        return {}  # half a line of a crash or a full disk
    return values if isinstance(values, dict) else {}


def rank_log_tail(folder: str | None, ranks: Sequence[int], *, lines: int = 3) -> list[str]:
    """The last lines of the first of these ranks' logs, for the batch log."""
    if folder is None or not ranks:
        return []
    text = read_text(Path(folder) / f"{ranks[0]}.log")[-4000:]
    return [line for line in text.splitlines() if line.strip()][-lines:]
