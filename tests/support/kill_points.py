# SPDX-License-Identifier: Apache-2.0
"""Where and how a run is killed: a random phase, occurrence, delay, signal and rank for every number."""

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tests.support.zygote import KILLER

STEPS, SAVE_EVERY = 5, 2  # of each stage: saves after steps 2, 4 and 5
EVALUATED = 4  # the step whose checkpoint is evaluated

# phase: how often it happens in an undisturbed stage
PHASES = {
    "start": 1,  # groups, data, model, weights of the stage before
    "load weights": 1,  # stage switch: the weights of the stage before
    "resume": 1,  # of a run that was killed before
    "step": STEPS,  # the first one is the warm-up's
    "save": 3,  # hashes, planning, copies
    "write": 3,  # the writing thread, while training goes on
    "finish": 3,  # index and manifest
    "publish": 3,  # rename, latest_step, old ones removed
    "evaluation": 1,  # its command starts and runs, while training goes on or a run that is done waits for it
    "evaluation result": 1,  # the command has ended, its numbers are taken in
    "end": 1,  # last step done and saved, DONE not yet written
}
_OF_RANK_0 = ("publish", "evaluation", "evaluation result", "end")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """At the `occurrence`-th time (from 1) that `phase` begins on `rank`, `delay_s` later, `signal` to its process."""

    phase: str
    occurrence: int
    delay_s: float
    signal: str
    rank: int
    reached: Path  # touched when the signal is sent

    def __call__(self, rank: int) -> None:
        """Lay the trap in a trainer that is about to start."""
        if rank != self.rank:
            return
        count = [0]
        owner, name = _place(self.phase)
        _wrap(owner, name, lambda: self._arm() if _increase(count) == self.occurrence else None)

    def _arm(self) -> threading.Thread | None:
        if self.delay_s == 0:
            self._strike()
            return None
        thread = threading.Thread(target=self._strike, name=KILLER, daemon=True)
        thread.start()
        # In the background, where nobody waits for it, a tiny file is written sooner than most signals come.
        return thread if self.phase == "write" else None

    def _strike(self) -> None:
        time.sleep(self.delay_s)
        self.reached.touch()
        os.kill(os.getpid(), getattr(signal, self.signal))

    def told(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "reached"}


def _increase(count: list[int]) -> int:
    count[0] += 1
    return count[0]


def _wrap(owner: Any, name: str, first: Callable[[], Any]) -> None:
    """Let `owner.name` call `first` first; a thread that this returns is waited for at the end."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        thread = first()
        result = function(*args, **kwargs)
        if thread is not None:
            thread.join()
        return result

    setattr(owner, name, wrapped)


def _place(phase: str) -> tuple[Any, str]:
    from megatron_eve.checkpoint.manager import CheckpointManager
    from megatron_eve.checkpoint.writer import FolderWrite, _ShardWriter
    from megatron_eve.training import run
    from megatron_eve.training.evaluation import Evaluations

    places: dict[str, tuple[Any, str]] = {
        "start": (run, "_assemble"),
        "load weights": (run, "load_weights"),
        "resume": (CheckpointManager, "resume"),
        "step": (run, "_step"),
        "save": (CheckpointManager, "save"),
        "write": (_ShardWriter, "write"),
        "finish": (FolderWrite, "finish"),
        "publish": (CheckpointManager, "_publish"),
        "evaluation": (Evaluations, "_start"),
        "evaluation result": (Evaluations, "_take_in"),
        "end": (run, "_finish"),
    }
    return places[phase]


@dataclass(frozen=True, kw_only=True)
class KillPoint:
    """What happens to one run: its stage, its processes, and one or two kills, each at another start."""

    stage: Literal["first", "second"]
    processes: int
    kills: tuple[Kill, ...]


def kill_point(number: int, folder: Path) -> KillPoint:
    """The same for the same number; every phase comes round."""
    draw = random.Random(number)
    phase = list(PHASES)[number % len(PHASES)]
    processes = 2 if number % 4 == 3 else 1
    stage: Literal["first", "second"] = "second" if phase == "load weights" else "first"
    if phase != "load weights" and draw.random() < 0.3:
        stage = "second"
    phases = [draw.choice(("step", "write", "publish")), phase] if phase == "resume" else [phase]
    kills = tuple(
        _draw_kill(draw, name, processes=processes, reached=folder / f"reached-{index}")
        for index, name in enumerate(phases)
    )
    return KillPoint(stage=stage, processes=processes, kills=kills)


def _draw_kill(draw: random.Random, phase: str, *, processes: int, reached: Path) -> Kill:
    occurrence = draw.randint(1, PHASES[phase])
    return Kill(
        phase=phase,
        occurrence=occurrence,
        delay_s=draw.choice((0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.2))),
        signal=draw.choice(("SIGKILL", "SIGKILL", "SIGTERM")),
        rank=0 if phase in _OF_RANK_0 else draw.randrange(processes),
        reached=reached,
    )


def summary(log: Path) -> str:
    """A Markdown table of a log of kill points, by phase of the last kill."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [
        "| phase | points | identical | of them in 2 processes | SIGTERM |",
        "|---|---|---|---|---|",
    ]
    for phase in [*PHASES, "all"]:
        mine = [e for e in entries if phase in ("all", e["kills"][-1]["phase"])]
        counts = (
            len(mine),
            sum(e["identical"] for e in mine),
            sum(e["processes"] == 2 for e in mine),
            sum(e["kills"][-1]["signal"] == "SIGTERM" for e in mine),
        )
        lines.append(f"| {phase} | " + " | ".join(str(count) for count in counts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
