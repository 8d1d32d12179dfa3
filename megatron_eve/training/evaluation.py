# SPDX-License-Identifier: Apache-2.0
"""Evaluation beside the training: a command on published checkpoints, under a time budget, that no step waits for.

    RUN_DIR/evaluations/step_00000400/     the command's folder: log.txt, and metrics.json, a flat object of numbers
    RUN_DIR/evaluations/step_00000400.2/   the same step once more: the first was interrupted, and may still be running
    RUN_DIR/evaluations.jsonl              one record an evaluation: step, outcome, seconds, metrics

One process of a run (rank 0) starts it; between two steps it only looks whether the checkpoint is there and whether
the command has ended (a stat and a waitpid). coreutils' `timeout` keeps the budget, even if the trainer dies. One
evaluation runs at a time: those due meanwhile are skipped and counted. An evaluation that a kill or stop interrupted
is due again when the run goes on. The numbers go into the next logged record as `evaluation/NAME`, with
`evaluated_step`; after the last record they stand in evaluations.jsonl alone. No failure here ends a run."""

import functools
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eve.config.schema import EvaluationConfig
from megatron_eve.metrics.definitions import EVALUATION_PREFIX
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import CHECKPOINTS, EVALUATION_METRICS, checkpoints_of, step_name

RECORDS_FILE, FOLDER, LOG_FILE = "evaluations.jsonl", "evaluations", "log.txt"
# Exit codes of `timeout`: the command ended at its limit; it was killed after it, and `timeout` with it.
TIMED_OUT = (124, 137, -signal.SIGKILL)
KILL_AFTER_S = 5
WAIT_S = 0.2  # between two looks at the end of a run
# The launcher's variables: a command that starts torch.distributed must not join this run.
_OF_THE_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
               "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE")  # fmt: skip
Outcome = Literal["done", "over budget", "failed", "stopped", "skipped"]
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    step: int
    process: subprocess.Popen[bytes]
    folder: Path
    started: float


def _harmless(method: Callable[..., None]) -> Callable[..., None]:
    """Decorate a method: an error in it ends the evaluations of this start, but not the run."""

    @functools.wraps(method)
    def guarded(self: "Evaluations", *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.give_up(f"{type(error).__name__}: {error}")

    return guarded


class Evaluations:
    """The evaluations of one run. Every method but `finish` returns at once."""

    def __init__(self, config: EvaluationConfig, *, run_dir: Path, is_starter: bool) -> None:
        """`is_starter`: this is rank 0; the other ranks hold an object that does nothing."""
        self._config, self._run_dir = config, run_dir
        self._is_on = is_starter and config.command is not None
        self._due: int | None = None
        self._running: _Running | None = None
        self._news: dict[str, float] = {}
        self._unfinished = 0  # of this process: over budget, failed, stopped or skipped

    @_harmless
    def resumed(self, step: int) -> None:
        """The run goes on after `step` steps. If nothing but a stop was recorded of its newest checkpoint that was to
        be evaluated, that is due again."""
        if not self._is_on:
            return
        steps = [
            one for one in checkpoints_of(self._run_dir) if one <= step and self._is_chosen(one)
        ]
        newest = max(steps, default=None)
        if newest is not None and newest not in self._settled():
            self._due = newest

    @_harmless
    def saved(self, step: int) -> None:
        """A checkpoint of this step is written, or being written."""
        if self._is_on and self._is_chosen(step):
            if self._due is not None:
                self._record(self._due, "skipped", seconds=0.0)
            self._due = step

    @_harmless
    def poll(self) -> None:
        """Take in what has ended and start what is due. Call it between steps."""
        if self._running is not None and (code := self._running.process.poll()) is not None:
            self._take_in(self._running, code)
        if self._due is not None and self._checkpoint(self._due).is_dir():
            step, self._due = self._due, None
            if self._running is None:
                self._start(step)
            else:
                self._record(step, "skipped", seconds=0.0)

    def news(self) -> dict[str, float]:
        """Metrics that arrived since the last call, for the record of a step."""
        news, self._news = self._news, {}
        return news

    @_harmless
    def finish(self, *, give_up: Callable[[], bool]) -> None:
        """At the end of the run: wait for what is due or runs, within its budget, unless `give_up` says to stop."""
        self.poll()
        if self._due is not None:
            self._record(self._due, "skipped", seconds=0.0)
            self._due = None
        while self._running is not None and not give_up():
            time.sleep(WAIT_S)
            self.poll()
        self.close()

    @_harmless
    def close(self) -> None:
        """Stop what still runs."""
        running, self._running = self._running, None
        if running is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        self._record(running.step, "stopped", seconds=time.monotonic() - running.started)

    def give_up(self, why: str) -> None:
        """Evaluate nothing more in this start."""
        _LOG.warning("evaluations end with this one: %s; the run goes on", why)
        self._is_on, self._due, self._running = False, None, None

    def _is_chosen(self, step: int) -> bool:
        every = self._config.every_steps
        return every is None or step % every == 0

    def _settled(self) -> set[int]:
        """Steps whose evaluation ended in any way but by a stop."""
        path = self._run_dir / RECORDS_FILE
        records = read_metrics(path) if path.is_file() else []
        return {int(r["step"] or 0) for r in records if r.get("outcome") not in (None, "stopped")}

    def _checkpoint(self, step: int) -> Path:
        """Exists under this name only when it is whole (checkpoint/manager.py)."""
        return self._run_dir / CHECKPOINTS / step_name(step)

    def _start(self, step: int) -> None:
        assert self._config.command is not None
        limit = ["timeout", f"--kill-after={KILL_AFTER_S}", str(self._config.timeout_s)]
        environment = {k: v for k, v in os.environ.items() if k not in _OF_THE_RUN}
        # The run's GPUs are full; a command may set its own
        environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            folder = _new_folder(self._run_dir / FOLDER / step_name(step))
            places = {"checkpoint": self._checkpoint(step), "out": folder, "step": step}
            words = [word.format(**places) for word in shlex.split(self._config.command)]
            with (folder / LOG_FILE).open("wb") as log:
                process = subprocess.Popen(
                    [*limit, *words], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:  # no program, no room on the disk: no reason to end a run
            _LOG.warning("evaluation of step %d did not start: %s", step, error)
            self._record(step, "failed", seconds=0.0)
            return
        self._running = _Running(step, process, folder, time.monotonic())
        _LOG.info("evaluation of step %d started, at most %d s", step, self._config.timeout_s)

    def _take_in(self, running: _Running, code: int) -> None:
        self._running = None
        seconds = time.monotonic() - running.started
        if code in TIMED_OUT:
            self._record(running.step, "over budget", seconds=seconds)
            return
        metrics = read_result(running.folder / EVALUATION_METRICS) if code == 0 else None
        if metrics is None:
            _LOG.warning("evaluation: exit %d, see %s", code, running.folder / LOG_FILE)
            self._record(running.step, "failed", seconds=seconds)
            return
        self._record(running.step, "done", seconds=seconds, metrics=metrics)

    def _record(
        self,
        step: int,
        outcome: Outcome,
        *,
        seconds: float,
        metrics: dict[str, float] | None = None,
    ) -> None:
        record = {"step": step, "outcome": outcome, "seconds": round(seconds, 3)}
        try:
            with (self._run_dir / RECORDS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record | {"metrics": metrics or {}}) + "\n")
        except OSError as error:  # the log and the next record have them
            _LOG.warning("evaluation of step %d is not in %s: %s", step, RECORDS_FILE, error)
        figures = "".join(f" | {name} {value:.4f}" for name, value in (metrics or {}).items())
        _LOG.info("evaluation of step %d %s after %.0f s%s", step, outcome, seconds, figures)
        self._unfinished += outcome != "done"
        self._news["evaluations_unfinished"] = float(self._unfinished)
        if metrics is not None:
            self._news["evaluated_step"] = float(step)
            self._news |= {EVALUATION_PREFIX + name: value for name, value in metrics.items()}


def _new_folder(path: Path) -> Path:
    """`path`, or `path`.2, ...: the command of a killed run may still write to the folder before."""
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = path.with_name(f"{path.name}.{number}")


def read_result(path: Path) -> dict[str, float] | None:
    """A flat JSON object of finite numbers; None if the file is anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    items = list(_numbers(content)) if isinstance(content, dict) else []
    return dict(items) if items and len(items) == len(content) else None


def _numbers(content: dict[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in content.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, float(value)
