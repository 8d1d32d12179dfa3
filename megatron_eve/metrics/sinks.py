# SPDX-License-Identifier: Apache-2.0
"""Where the metrics of a logged step go: the console and metrics.jsonl always, TensorBoard and W&B if the configuration
asks for them (optional_sinks.py). One process of a run writes; the others hold sinks that do nothing.

A run that resumes at step k repeats the steps after k, so opening drops their old records: metrics.jsonl never holds a
step twice. It is replaced atomically, and each record is flushed at once: a killed process loses none."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from megatron_eve.config.schema import RunConfig
from megatron_eve.metrics.console import console_line
from megatron_eve.metrics.definitions import EVALUATION_PREFIX, METRICS
from megatron_eve.run_files import METRICS_FILE
from megatron_eve.whole import write_text

_LOG = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the values of one logged step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """All sinks of a run, one call for each step."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    @classmethod
    def open(
        cls,
        config: RunConfig,
        *,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        is_writer: bool,
    ) -> Self:
        """The sinks that the configuration asks for; none unless `is_writer`. `start_step`: steps already done; records
        of later steps are dropped, because they come again.

        Raises: ConfigError if a sink's package is not installed."""
        if not is_writer:
            return cls([])
        run_dir.mkdir(parents=True, exist_ok=True)
        sinks: list[Sink] = [
            ConsoleSink(total_steps=total_steps),
            JsonlSink(run_dir / METRICS_FILE, start_step=start_step),
        ]
        if config.logging.tensorboard or config.logging.wandb:
            from megatron_eve.metrics.optional_sinks import optional_sinks

            sinks += optional_sinks(config, run_dir=run_dir, start_step=start_step)
        return cls(sinks)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step, by names of definitions.py."""
        unknown = [
            name
            for name in values
            if name not in METRICS and not name.startswith(EVALUATION_PREFIX)
        ]
        assert not unknown, f"metrics {unknown} are not declared in definitions.py"
        for sink in self._sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class ConsoleSink:
    """One greppable line a step through the standard logging package."""

    def __init__(self, *, total_steps: int) -> None:
        self._total_steps = total_steps

    def log(self, step: int, values: Mapping[str, float]) -> None:
        _LOG.info("%s", console_line(values, step=step, total_steps=self._total_steps))

    def close(self) -> None:
        """Nothing is held open."""


class JsonlSink:
    """One JSON object a step: `step`, `time` (Unix seconds), then the values; null for a number that is not finite."""

    def __init__(self, path: Path, *, start_step: int) -> None:
        _drop_records_after(path, step=start_step)
        self._file = path.open("ab", buffering=0)
        self._waiting: list[str] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **finite}
        self._waiting.append(json.dumps(record, allow_nan=False) + "\n")
        self._write()

    def _write(self) -> None:
        """Write all waiting records, or none: a full disk must not end a run before its checkpoint does."""
        text = "".join(self._waiting).encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            waiting = len(self._waiting)
            _LOG.warning("%s: %s; %d records wait", self._file.name, error.strerror, waiting)
        else:
            self._waiting = []

    def close(self) -> None:
        """Try once more to write waiting records."""
        if self._waiting:
            self._write()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The records of a metrics.jsonl in its order, without a line that a crash cut off."""
    records = [
        _parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return [record for record in records if record is not None]


def _parse(line: str) -> dict[str, float | None] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _drop_records_after(path: Path, *, step: int) -> None:
    """Keep the whole records up to `step`, atomically; leave a file that needs no change alone."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    kept = "".join(
        f"{line}\n"
        for line in text.splitlines()
        if (record := _parse(line)) is not None and (record["step"] or 0) <= step
    )
    if kept == text:
        return
    dropped = text.count("\n") - kept.count("\n")
    _LOG.info("%s: dropped %d records after step %d, to be written again", path, dropped, step)
    write_text(path, kept)
