# SPDX-License-Identifier: Apache-2.0
"""The demo as a list of steps, each done once: a record OUT/steps/NAME.json says that a step is done, by which
commands and in how many seconds. An interrupted demo goes on with the first step that is not done; that step's own
commands keep what they had finished. Refuses a folder whose done steps were made by other commands, a folder that
holds something else, and two demos in one folder at a time.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from megatron_eve.errors import ConfigError
from megatron_eve.folder_lock import only_one
from megatron_eve.whole import write_json
from tools.process import Command, CommandFailed, run_command

STEPS_FOLDER = "steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Commands that belong together."""

    name: str
    commands: tuple[Command, ...]
    proof: Path | None = None  # a file that is there if and only if the commands did all their work


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What is known about a step; `seconds` counts interrupted attempts too."""

    commands: tuple[str, ...]
    seconds: float
    done: bool


class Progress:
    """The records of one run folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def record(self, step: Step) -> StepRecord:
        """The step's record. Raises: ConfigError if it was done by other commands."""
        commands = self._texts(step)
        path = self._path(step)
        if not path.is_file():
            return StepRecord(commands=commands, seconds=0.0, done=False)
        found = json.loads(path.read_text())
        if found["done"] and tuple(found["commands"]) != commands:
            old, new = _first_difference(found["commands"], commands)
            raise ConfigError(
                f"{self.out}: step {step.name} was done with other options; found '{old}', now asked for '{new}'; give "
                "the same options, choose another --out, or delete the folder to start anew."
            )
        return StepRecord(commands=commands, seconds=found["seconds"], done=found["done"])

    def write(self, step: Step, *, seconds: float, done: bool) -> None:
        """Replace the step's record, atomically."""
        record = StepRecord(commands=self._texts(step), seconds=round(seconds, 2), done=done)
        write_json(self._path(step), asdict(record))

    def _path(self, step: Step) -> Path:
        return self.out / STEPS_FOLDER / f"{step.name}.json"

    def _texts(self, step: Step) -> tuple[str, ...]:
        out = re.compile(rf"(?<![^\s=]){re.escape(str(self.out))}(?=[/\s]|$)")
        return tuple(out.sub("OUT", command.text) for command in step.commands)


def run_steps(steps: Sequence[Step], *, out: Path, stop_after: str | None = None) -> bool:
    """Do the steps that are not done, up to `stop_after`; whether all are done.

    Raises: ConfigError if the folder does not fit; CommandFailed naming the step that failed."""
    progress = Progress(out)
    _claim(out)
    with only_one(out, what="demo") as lock:  # a child has it too, and may still save
        records = [progress.record(step) for step in steps]
        for number, (step, record) in enumerate(zip(steps, records, strict=True), start=1):
            title = f"[{number}/{len(steps)}] {step.name}"
            if record.done:
                print(f"{title}: already done, in {record.seconds:.0f} s", flush=True)
            else:
                _run_step(step, progress=progress, before=record.seconds, title=title, lock=lock)
            if step.name == stop_after:
                return number == len(steps)
    return True


def plan_lines(steps: Sequence[Step], *, out: Path) -> list[str]:
    """The plan of run_steps, in lines."""
    progress = Progress(out)
    lines: list[str] = []
    for step in steps:
        state = "already done" if progress.record(step).done else "to do"
        lines += [f"{step.name} ({state})", *(f"  {command.text}" for command in step.commands)]
    return lines


def step_seconds(steps: Sequence[Step], *, out: Path) -> dict[str, float]:
    """Name -> seconds."""
    progress = Progress(out)
    return {step.name: progress.record(step).seconds for step in steps}


def _run_step(step: Step, *, progress: Progress, before: float, title: str, lock: IO[Any]) -> None:
    print(f"{title}: start", flush=True)
    started = time.monotonic()
    done = False
    try:
        for command in step.commands:
            print(f"+ {command.text}", flush=True)
            run_command(command, held=lock)
        if step.proof is not None and not step.proof.exists():
            raise CommandFailed(
                f"stopped before its end ({step.proof} is not there); run the demo again to go on\n"
                f"  log: {step.commands[-1].log}"
            )
        done = True
    except CommandFailed as error:
        raise CommandFailed(f"step {step.name} failed: {error}") from error
    finally:
        seconds = before + time.monotonic() - started
        progress.write(step, seconds=seconds, done=done)
    print(f"{title}: done in {seconds:.0f} s", flush=True)


def _claim(out: Path) -> None:
    if out.is_dir() and not (out / STEPS_FOLDER).is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something that is no demo; choose another --out.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another --out.")
    (out / STEPS_FOLDER).mkdir(parents=True, exist_ok=True)


def _first_difference(old: Sequence[str], new: Sequence[str]) -> tuple[str, str]:
    pairs = zip([*old, ""], [*new, ""], strict=False)
    return next(((a, b) for a, b in pairs if a != b), ("", ""))
