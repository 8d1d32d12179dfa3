# SPDX-License-Identifier: Apache-2.0
"""Records of the training runs behind a checkpoint: the facts of a model card.

In: a run directory (config.txt, metrics.jsonl) and, through `checkpoint.load_weights_from`, the runs before it. Out:
one record a run, oldest first. Nothing is computed anew and nothing is guessed: a fact that is missing, or whose file
is gone, is None. Lines are read by their key, so runs of older and newer versions can be read too."""

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.config.text_form import lines_of
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.run_files import CHECKPOINTS, CONFIG, METRICS_FILE, step_of


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """One source of a run's samples."""

    name: str  # the folder's name, without the path on the training machine
    num_samples: int | None  # None: the shards are gone
    proportion: float
    template: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One training run."""

    name: str
    config: dict[str, str]  # config.txt, `key: value`
    sources: tuple[SourceRecord, ...]
    last_step: int | None  # of metrics.jsonl
    last_loss: float | None  # nats a token, of that step


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The runs behind a checkpoint, oldest first, and what the first one started from."""

    runs: tuple[RunRecord, ...]
    start: str | None  # None: from random weights


def read_history(folder: Path) -> History:
    """Follow a checkpoint's run back to the first one. `folder`: a run directory, or a checkpoint of a run; then
    metrics of later steps are left out. Any other folder gives an empty history."""
    runs: list[RunRecord] = []
    followed: set[Path] = set()
    step = step_of(folder)
    while True:
        folder = _run_directory(folder)
        config = _lines(folder / CONFIG)
        if "recipe" not in config or folder.resolve() in followed:
            break
        followed.add(folder.resolve())
        runs.insert(0, _run_record(folder, config, up_to_step=step))
        before = config.get("checkpoint.load_weights_from", "none")
        if before == "none":
            return History(runs=tuple(runs), start=None)
        folder = Path(before)
        step = step_of(folder)  # a run may have started from any checkpoint of the one before
    # A converter notes the folder it read, with its path on that machine.
    return History(runs=tuple(runs), start=Path(config.get("converted_from", folder.name)).name)


def _run_directory(folder: Path) -> Path:
    """A checkpoint inside a run stands for its run."""
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def _run_record(folder: Path, config: dict[str, str], *, up_to_step: int | None) -> RunRecord:
    path = folder / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    if up_to_step is not None:
        records = [record for record in records if (record["step"] or 0) <= up_to_step]
    last = records[-1] if records else {}
    step = last.get("step")
    return RunRecord(
        name=folder.name,
        config=config,
        sources=_sources(config),
        last_step=None if step is None else int(step),
        last_loss=last.get("loss"),
    )


def _sources(config: dict[str, str]) -> tuple[SourceRecord, ...]:
    found: list[SourceRecord] = []
    while (path := config.get(f"data.sources.{len(found)}.path")) is not None:
        prefix = f"data.sources.{len(found)}"
        template = config.get(f"{prefix}.template", "none")
        found.append(
            SourceRecord(
                name=Path(path).name,
                num_samples=_num_samples(Path(path)),
                proportion=float(config.get(f"{prefix}.proportion", "1")),
                template=config.get("data.template", "") if template == "none" else template,
            )
        )
    return tuple(found)


def _num_samples(shards: Path) -> int | None:
    """From the MDS index, which data_prep wrote."""
    index = shards / "index.json"
    if not index.is_file():
        return None
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return sum(int(shard["samples"]) for shard in content["shards"])
    except (OSError, ValueError, KeyError, TypeError):  # being rebuilt, or damaged since
        return None


def _lines(path: Path) -> dict[str, str]:
    return lines_of(path.read_text(encoding="utf-8")) if path.is_file() else {}
