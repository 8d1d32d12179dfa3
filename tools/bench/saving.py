# SPDX-License-Identifier: Apache-2.0
"""The seconds that a checkpoint costs the training, written in the background and waited for.

    python -m tools.bench.saving --out runs/bench

Stage 2.2 (everything trained) of a scaled 7B in one process. In each round: steps alone; a save in the background and
steps until it is on the disk; a save that the training waits for. In the background it costs what save() takes (hashes
of the canonical tensors, planning, copies) and what the steps beside the writing take more than alone: both want memory
and the interpreter. The ratio is taken inside a round, medians over the rounds. Writes saving.json; prints Markdown.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.command import end_with
from megatron_eve.data.sample import Pack
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from tools.bench.contenders import OurStep
from tools.bench.report import (
    add_output_options,
    markdown_table,
    median_ratio,
    run_benchmark,
)
from tools.bench.samples import as_pack, steps_of_packs, stream
from tools.bench.setting import Scale, scaled_config

_MIB = 2**20


class Contender:
    """A training whose checkpoints go to a folder beside the results, so on the same disk."""

    def __init__(self, *, scale: Scale, folder: Path) -> None:
        config = scaled_config("2.2", scale=scale)
        state = init_model_parallel(config.parallel, seed=config.train.seed)
        self._ours = OurStep(config, state=state)
        samples = stream(config, token_share=scale.token_share, seed=config.data.seed)
        steps = steps_of_packs(config, samples, packs_per_step=1)
        packs = [[as_pack(one.packs[0], config=config)] for one in itertools.islice(steps, 4)]
        self._packs: Iterator[list[Pack]] = itertools.cycle(packs)
        self._folder, self._saves = folder, itertools.count(1)
        self.step()  # makes the moments

    def step(self) -> float:
        """Seconds of one optimizer step."""
        return _seconds(lambda: self._ours.step(next(self._packs)))

    def save(self, *, async_save: bool) -> tuple[float, list[float]]:
        """Seconds of save(), and of each step until the checkpoint was written."""
        manager = CheckpointManager(
            self._folder, keep_last=1, config_text="", async_save=async_save
        )
        number = next(self._saves)
        held = _seconds(lambda: manager.save(self._ours.training, step=number, data={}))
        steps: list[float] = []
        while async_save and manager.poll() is None:
            steps.append(self.step())
        return held, steps

    def mib(self) -> float:
        """Size of the checkpoint on the disk."""
        files = self._folder.glob("checkpoints/step_*/*")
        return sum(file.stat().st_size for file in files) / _MIB


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(contender: Contender, *, rounds: int, alone: int) -> dict[str, Any]:
    """One width: a row of the result."""
    rows: list[dict[str, Any]] = []
    costs: list[float] = []
    for _ in range(rounds):
        step = statistics.median(contender.step() for _ in range(alone))
        held, steps = contender.save(async_save=True)
        waited, _ = contender.save(async_save=False)
        costs.append(held + sum(steps) - len(steps) * step)
        rows.append({"step": step, "held": held, "beside": steps, "waited": waited})
    return {
        "checkpoint_mib": round(contender.mib(), 1),
        "cost_of_waited": round(median_ratio(costs, [row["waited"] for row in rows]), 4),
        "seconds": [{**row, "cost": cost} for row, cost in zip(rows, costs, strict=True)],
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def median(row: dict[str, Any], name: str) -> str:
        return f"{statistics.median(one[name] for one in row['seconds']):.2f}"

    return markdown_table(
        [
            {
                "hidden": row["hidden"],
                "checkpoint, MiB": f"{row['checkpoint_mib']:,.0f}",
                "step alone, s": median(row, "step"),
                "waited for, s": median(row, "waited"),
                "in the background it costs, s": median(row, "cost"),
                "of that save(), s": median(row, "held"),
                "cost of waited for": f"{row['cost_of_waited']:.0%}",
            }
            for row in rows
        ]
    )


def _measure_widths(options: argparse.Namespace) -> list[dict[str, Any]]:
    init_distributed(timeout_s=600)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for hidden in options.hidden:
        scale = Scale(
            hidden_size=hidden, num_layers=options.layers, token_share=options.token_share
        )
        folder = Path(tempfile.mkdtemp(prefix="saving-", dir=options.out))
        try:
            contender = Contender(scale=scale, folder=folder)
            found = measure(contender, rounds=options.rounds, alone=options.alone)
        finally:
            shutil.rmtree(folder)
        rows.append({"hidden": hidden, **found})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.saving",
        description="The seconds that a checkpoint costs the training, in the background and waited for.",
        epilog="example: python -m tools.bench.saving --out runs/bench",
    )
    add_output_options(parser, name="saving")
    parser.add_argument("--hidden", nargs="+", type=int, default=[256], help="widths (256)")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (28)")
    parser.add_argument(
        "--token-share", type=float, default=0.0078125, help="of 7B's tokens (1/128)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--alone", type=int, default=3, help="steps alone in a round (3)")
    options = parser.parse_args(arguments)
    return run_benchmark(
        options, name="saving", measure=lambda: _measure_widths(options), table=_table
    )


if __name__ == "__main__":
    end_with(main)
