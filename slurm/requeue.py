# SPDX-License-Identifier: Apache-2.0
"""Puts a job back into the queue under its own id, keeps it off bad nodes, and says why where it does not.

Slurm's commands are tried again for minutes (slurm/commands.py), and before each try of `scontrol requeue` the job's
state is looked at: after scancel a requeue would bring the job back against its owner's will.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence

from . import commands
from .commands import SlurmError
from .job import Job

KILL_WAIT_S = 300.0
"""How long Slurm may take to end this process after a requeue."""
HOLD_WAIT_S, LOOK_S, LATER_S = 90.0, 3.0, 60
WAITING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")
HELD = "held"
"""In the Reason of a job that Slurm will not start again by itself, as launch_failed_requeued_held."""

log = logging.getLogger("slurm.launcher")


def ending_by_slurm(fields: Mapping[str, str]) -> str | None:
    """Why requeueing is not this process's business: after scancel it would bring the job back against its owner's
    will, after a node's death or a requeue by hand Slurm does it. None while the job counts as running, and at the time
    limit, when a save outlasted the signal's ten minutes."""
    state = fields.get("JobState", "RUNNING")
    if state == "RUNNING" or fields.get("Reason") == "TimeLimit":
        return None
    return f"Slurm is ending the job by itself, JobState={state}"


def requeue(job: Job, *, why: str, exclude: Sequence[str]) -> int:
    """Ask until it is done. Returns the exit code of this process, which Slurm ends long before in the good case."""
    log.info("requeue: %s", why)
    started, waits = time.monotonic(), commands.pauses(commands.patience_s())
    command = ["scontrol", "requeue", job.job_id]
    while True:
        try:
            fields = commands.job_fields(job.job_id, limit_s=0)
            ending = ending_by_slurm(fields)
            if ending:
                log.info("not requeued (%s): %s", why, ending)
                if fields["JobState"] == "PENDING":
                    leave(job, fields)
                return 1
            answer = commands.call(command)
            if answer.code == 0:
                break
            words, is_final = answer.words, answer.is_final
        except SlurmError as error:
            words, is_final = str(error), "found no command" in str(error)
        pause = None if is_final else next(waits, None)
        if pause is None:
            _say_refused(job, words=words, spent=time.monotonic() - started)
            return 1
        log.warning("not requeued yet: %s; again in %.0f s", words, pause)
        time.sleep(pause)
    if exclude:
        exclude_nodes(job, exclude)
    watch(job, limit_s=KILL_WAIT_S)
    return 1


def _say_refused(job: Job, *, words: str, spent: float) -> None:
    advice = (
        "it was submitted with --no-requeue or SBATCH_NO_REQUEUE"
        if "presently disabled" in words
        else f"submit it again, or `scontrol requeue {job.job_id}` once Slurm answers"
    )
    log.error("job %s could not be requeued in %.0f s: %s; %s", job.job_id, spent, words, advice)


def leave(job: Job, fields: Mapping[str, str]) -> None:
    """The job is pending although this process lives. Somebody requeued it; or a controller that was killed lost that
    it runs: then it would start it a second time at once, the node would refuse, and the job be held for ever. A later
    start gives this one time to be gone."""
    log.info("if squeue shows it as held (launch failed): scontrol release %s", job.job_id)
    if fields.get("Restarts") == str(job.restart):
        later = ["scontrol", "update", f"JobId={job.job_id}", f"StartTime=now+{LATER_S}"]
        answer = commands.call(later)
        if answer.code == 0:
            log.warning("Slurm lost that job %s runs; it starts again in %d s", job.job_id, LATER_S)
            return
        log.warning("%s: %s", " ".join(later), answer.words)
    watch(job, limit_s=HOLD_WAIT_S)


def watch(job: Job, *, limit_s: float) -> None:
    """Stay until Slurm ends this process, and release the job if it ends up held."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            fields = commands.job_fields(job.job_id, limit_s=0)
        except SlurmError as error:
            log.warning("%s", error)
            fields = {"JobState": "PENDING"}
        if HELD in fields.get("Reason", ""):
            _release(job, reason=fields["Reason"])
            return
        if fields.get("JobState") not in WAITING:
            return
        time.sleep(LOOK_S)


def _release(job: Job, *, reason: str) -> None:
    log.warning("job %s is held (%s): releasing it", job.job_id, reason)
    try:
        commands.ask("scontrol", "release", job.job_id)
    except SlurmError as error:
        log.error("%s; release it by hand: scontrol release %s", error, job.job_id)


def exclude_nodes(job: Job, nodes: Sequence[str]) -> None:
    """Keep the requeued job off these nodes too. Slurm accepts it only once the job counts as pending."""
    words = ""
    for pause in commands.pauses(KILL_WAIT_S, first_s=0.5, longest_s=5):
        try:
            fields = commands.job_fields(job.job_id, limit_s=0)
            everything = ",".join([*_listed(fields, "ExcNodeList"), *nodes])
            answer = commands.call(
                ["scontrol", "update", f"JobId={job.job_id}", f"ExcNodeList={everything}"]
            )
            if answer.code == 0:
                log.info("excluded %s", everything)
                return
            words = answer.words
        except SlurmError as error:
            words = str(error)
        time.sleep(pause)
    log.error("could not exclude %s (%s); use sbatch --exclude", ",".join(nodes), words)


def too_few_nodes(job: Job, *, bad: Sequence[str]) -> str | None:
    """Why the job could never start again without the bad nodes; None if it can, or if Slurm does not tell."""
    try:
        fields = commands.job_fields(job.job_id)
        wanted = set(_expanded(fields, "ReqNodeList"))
        if named := sorted(wanted & set(bad)):
            return f"it asks for {','.join(named)} by name (--nodelist)"
        excluded = {*_expanded(fields, "ExcNodeList"), *bad}
        left = _candidates(fields) - excluded
    except SlurmError as error:
        log.warning("cannot count the nodes that remain: %s", error)
        return None
    if len(left) >= job.num_nodes or not excluded:
        return None
    return (
        f"without {','.join(sorted(excluded))} only {len(left)} nodes remain in partition "
        f"{fields.get('Partition', '?')}, and it needs {job.num_nodes}"
    )


def _candidates(fields: Mapping[str, str]) -> set[str]:
    """Nodes on which the job may run, in whatever state they are now. Raises: SlurmError."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N %f"]
    command += [f"--partition={fields['Partition']}"] if "Partition" in fields else []
    features = {
        line.split()[0]: line.split()[1:]
        for line in commands.ask(*command).splitlines()
        if line.split()
    }
    found = set(features)
    asked = fields.get("Features", "(null)")
    if asked.replace("_", "").isalnum():  # one word; what combines several is left to Slurm
        found = {node for node in found if asked in "".join(features[node]).split(",")}
    reservation = fields.get("Reservation", "(null)")
    if reservation != "(null)":
        text = commands.ask("scontrol", "show", "reservation", "--oneliner", reservation)
        named = re.search(r"\bNodes=(\S+)", text)
        if named:
            found &= set(commands.host_names(named[1]))
    return found


def _listed(fields: Mapping[str, str], name: str) -> list[str]:
    """A list of nodes in Slurm's compressed form, as one word or none."""
    text = fields.get(name, "(null)")
    return [] if text in ("(null)", "") else [text]


def _expanded(fields: Mapping[str, str], name: str) -> list[str]:
    return [host for text in _listed(fields, name) for host in commands.host_names(text)]
