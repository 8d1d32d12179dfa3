# SPDX-License-Identifier: Apache-2.0
"""Facts of this process's job from Slurm and the site, in the environment of its batch script.

Refuses a variable that is missing, or no number where one is needed, with exit code 2 and its name.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Number = TypeVar("Number", int, float)

log = logging.getLogger("slurm.launcher")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One start of a job."""

    job_id: str
    restart: int  # 0 at the first start
    node_list: str  # Slurm's compressed form
    num_nodes: int
    num_tasks: int
    max_restarts: int
    max_no_progress: int
    stop_grace_s: float
    name: str = "?"
    user: str = "?"
    cluster: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Job":
        """Read the job from Slurm's variables. Exits with 2 and the name of one that is missing or wrong."""
        for name, kind in (("EVE_MIN_FREE_GIB", float), ("EVE_SLURM_PATIENCE_S", float)):
            _number(env, name, kind, default="0")  # read elsewhere; a wrong one is told here
        return cls(
            job_id=_text(env, "SLURM_JOB_ID"),
            restart=_number(env, "SLURM_RESTART_COUNT", int, default="0"),
            node_list=_text(env, "SLURM_JOB_NODELIST"),
            num_nodes=_number(env, "SLURM_NNODES", int),
            num_tasks=_number(env, "SLURM_NTASKS", int),
            max_restarts=_number(env, "EVE_MAX_RESTARTS", int, default="50"),
            max_no_progress=_number(env, "EVE_MAX_NO_PROGRESS", int, default="3"),
            stop_grace_s=_number(env, "EVE_STOP_GRACE_S", float, default="480"),
            name=env.get("SLURM_JOB_NAME", "?"),
            user=env.get("SLURM_JOB_USER", "?"),
            cluster=env.get("SLURM_CLUSTER_NAME", ""),
        )


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        log.error("found no %r in the environment; start this through sbatch", name)
        raise SystemExit(2)
    return env[name]


def _number(
    env: Mapping[str, str], name: str, kind: Callable[[str], Number], *, default: str | None = None
) -> Number:
    text = env.get(name) or default or _text(env, name)
    try:
        return kind(text)
    except ValueError:
        log.error("found %s=%s, expected a number", name, text)
        raise SystemExit(2) from None
