# SPDX-License-Identifier: Apache-2.0
"""Slurm's commands, tried until they answer: a controller that restarts, fails over or is overloaded is away for
minutes, and no job may end because of it.

In: the words of a command. Out: what it prints. A command that fails is tried again with growing pauses for
EVE_SLURM_PATIENCE_S seconds, each failure logged in Slurm's own words, unless those say that trying again is useless.
Raises SlurmError with the last of them, the number of tries and the time spent.
"""

import logging
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DEFAULT_PATIENCE_S = 900.0
"""A controller's fail-over takes up to some minutes; an upgrade about ten."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
NO_ANSWER_S = 120.0
"""Slurm's own commands give up long before; one that hangs on a dead file system does not."""

FINAL = (
    "Invalid job id",
    "presently disabled",  # --no-requeue
    "ermission denied",
    "already completing or completed",
    "Job is pending execution",  # it is requeued already
    "Invalid hostlist",
    "Invalid host",
)
"""Answers that stay the same however often one asks."""
AWAY = (
    "Unable to contact slurm controller",
    "Unable to confirm allocation",
    "Unable to establish control machine",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "Communication connection failure",
    "Connection refused",
    "Connection reset",
    "Connection timed out",
    "Transport endpoint",
    "Unexpected message received",  # the controller reads its state again
    "temporarily unable to accept job",
    "Slurm backup controller in standby mode",
    "Resource temporarily unavailable",
    "Protocol authentication error",  # munge restarts
    "Invalid authentication credential",
)
"""Slurm's words for: nobody has looked at the request."""
TOOK_NONE = (
    "Unable to contact slurm controller",
    "Connection refused",
    "temporarily unable to accept job",
    "Resource temporarily unavailable",
    "Slurm backup controller in standby mode",
    "Protocol authentication error",
    "Invalid authentication credential",
)
"""sbatch's words for: there is no job. Anything else may have left one in the queue and must not be tried again."""

log = logging.getLogger("slurm.commands")


class SlurmError(Exception):
    """A command of Slurm did not do its work; the text is Slurm's own, with the tries and the time spent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer of one call of a command."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Slurm's own words of what went wrong, on one line."""
        text = " / ".join(line.strip() for line in self.err.splitlines() if line.strip())
        return text or f"exit code {self.code} without a word"

    @property
    def is_final(self) -> bool:
        return any(text in self.err for text in FINAL)

    @property
    def is_away(self) -> bool:
        return is_away(self.err)


def is_away(text: str) -> bool:
    """Whether Slurm's own words say that the controller could not be reached or asked."""
    return any(words in text for words in AWAY)


def took_none(text: str) -> bool:
    """Whether a failed submission certainly left no job behind."""
    return any(words in text for words in TOOK_NONE)


def patience_s() -> float:
    """How long a failing command is tried again."""
    return float(os.environ.get("EVE_SLURM_PATIENCE_S") or DEFAULT_PATIENCE_S)


def pauses(
    limit_s: float, *, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S
) -> Iterator[float]:
    """The pause to make before each further try, growing, until `limit_s` is spent; the caller sleeps."""
    started, pause = time.monotonic(), first_s
    while (left := limit_s - (time.monotonic() - started)) > 0:
        yield min(pause, left)
        pause = min(2 * pause, longest_s)


def call(argv: Sequence[str], *, env: dict[str, str] | None = None) -> Answer:
    """One call, without a second try. Raises: SlurmError if the command is not installed."""
    try:
        result = subprocess.run(
            list(argv),
            env=env,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NO_ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        return Answer(code=124, out="", err=f"{argv[0]} gave no answer in {NO_ANSWER_S:g} s")
    except FileNotFoundError as error:
        raise SlurmError(
            f"found no command {argv[0]} on PATH; is this a machine of the cluster?"
        ) from error
    except OSError as error:
        return Answer(code=126, out="", err=f"{argv[0]} could not be started: {error}")
    return Answer(code=result.returncode, out=result.stdout, err=result.stderr)


def ask(*argv: str, limit_s: float | None = None) -> str:
    """The command's output, tried again until it answers. Raises: SlurmError."""
    limit = patience_s() if limit_s is None else limit_s
    started, tries, waits = time.monotonic(), 0, pauses(limit)
    while True:
        tries += 1
        answer = call(argv)
        if answer.code == 0:
            return answer.out
        pause = None if answer.is_final else next(waits, None)
        if pause is None:
            spent = time.monotonic() - started
            times = "one try" if tries == 1 else f"{tries} tries in {spent:.0f} s"
            raise SlurmError(f"{shlex.join(argv)}: {answer.words} ({times})")
        log.warning("%s: %s; again in %.0f s", shlex.join(argv), answer.words, pause)
        time.sleep(pause)


def job_fields(job_id: str, *, limit_s: float | None = None) -> dict[str, str]:
    """What Slurm knows of a job; empty if it no longer knows it. Raises: SlurmError."""
    try:
        text = ask("scontrol", "show", "job", "--oneliner", job_id, limit_s=limit_s)
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    return dict(re.findall(r"(\w+)=(\S+)", text))


def host_names(node_list: str) -> list[str]:
    """Expand `node[01-16]`; also `node01,node[03-04]`. Raises: SlurmError."""
    return ask("scontrol", "show", "hostnames", node_list).split()
