# SPDX-License-Identifier: Apache-2.0
"""A run's folder belongs to one job at a time: RUN_DIR/launcher/job.json names it.

The first start of a job takes the folder; its requeued starts own it already. A second job in the folder refuses and
names the first, before it writes anything there: its STOP would stop the first one's ranks, and its starts would be
counted as theirs. A job that has ended leaves its folder to the next; Slurm is asked whether it has.
Raises FolderTakenError, SlurmError.
"""

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_eve.whole import write_text

from . import commands
from .folder import read_text
from .job import Job

OWNER = "job.json"
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
)
ENDING = ("COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT")

log = logging.getLogger("slurm.launcher")


class FolderTakenError(Exception):
    """The folder belongs to another job that is queued or runs."""


def claim(run_dir: Path, job: Job) -> None:
    """Make the folder this job's. Raises: FolderTakenError, SlurmError, OSError."""
    folder = run_dir / "launcher"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / ".lock"):
        owner = read_owner(run_dir)
        if owner.get("job") == job.job_id and owner.get("cluster", "") == job.cluster:
            return
        if owner:
            _refuse_unless_ended(owner, run_dir=run_dir, job=job)
        values = {"job": job.job_id, "cluster": job.cluster, "name": job.name, "user": job.user}
        values["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        write_text(folder / OWNER, json.dumps(values) + "\n")
        now = read_owner(run_dir).get("job")  # without locks, the later of two writers has it
        if now != job.job_id:
            raise FolderTakenError(
                f"{run_dir} was taken by job {now} at the same moment; this job leaves it"
            )


def read_owner(run_dir: Path) -> dict[str, str]:
    """The note of the job that has the folder; empty if none can be read."""
    try:
        values = json.loads(read_text(run_dir / "launcher" / OWNER))
    except ValueError:
        return {}
    if not isinstance(values, dict) or not values.get("job"):
        return {}
    return {str(key): str(value) for key, value in values.items()}


def _refuse_unless_ended(owner: dict[str, str], *, run_dir: Path, job: Job) -> None:
    """Slurm knows whether the other job has ended; wait for one that is about to."""
    other = owner["job"]
    about = f"job {other} ({owner.get('name', '?')} of {owner.get('user', '?')}, since {owner.get('since', '?')})"
    way_out = (
        f"wait for it, or `scancel {other}`, or give this job another run_dir; if it has ended nevertheless, "
        f"remove {run_dir}/launcher/{OWNER}"
    )
    if owner.get("cluster", "") != job.cluster:
        raise FolderTakenError(
            f"{run_dir} belongs to {about} of cluster {owner.get('cluster') or '?'}, which {job.cluster or 'this one'} "
            f"cannot ask: {way_out}"
        )
    for pause in commands.pauses(commands.patience_s()):
        state = commands.job_fields(other).get("JobState", "COMPLETED")
        if state in ENDED:
            log.info("%s belonged to %s, which has ended (%s)", run_dir, about, state)
            return
        if state not in ENDING:
            break
        log.info(
            "%s belongs to %s, which is ending; looking again in %.0f s", run_dir, about, pause
        )
        time.sleep(pause)
    raise FolderTakenError(f"{run_dir} belongs to {about}, {state}: {way_out}")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One launcher at a time, where the file system has locks."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s)", path, error)
        yield
