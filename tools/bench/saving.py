# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs the training: steps while one is written, and how long save() holds the training up.

    python -m tools.bench.saving --out runs/bench

Stage 2.2 (everything trained) of a scaled 7B, one process, few tokens a step: the smaller a step's products, the larger
the interpreter's share in it, which the writing thread takes its turns from. In each round: steps alone; a save in the
background and steps until its last byte is on the disk (the last one is not counted, the writing may end within it); a
save that the training waits for. Ratios are taken inside a round, medians over the rounds. Writes saving.json; prints
Markdown.
"""

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.data.sample import Pack
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from tools.bench.contenders import OurStep
from tools.bench.report import (
    BenchmarkError,
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

    def save(self, *, in_background: bool) -> tuple[float, list[float], Path]:
        """Seconds that save() took, of each step until the checkpoint was there, and where it is."""
        manager = CheckpointManager(
            self._folder, keep_last=1, config_text="", in_background=in_background
        )
        number = next(self._saves)
        held = _seconds(lambda: manager.save(self._ours.training, step=number, data={}))
        path = manager.folder / f"step_{number:08d}"
        steps: list[float] = []
        while in_background and manager.poll() is None:
            steps.append(self.step())
        return held, steps[:-1], path


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(contender: Contender, *, rounds: int, alone: int) -> dict[str, Any]:
    """One width: a row of the result. Raises: BenchmarkError if a step takes as long as a checkpoint."""
    row: dict[str, Any] = {"alone": [], "while_writing": [], "counted_steps": []}
    row |= {"save_in_background": [], "save_waited_for": []}
    for _ in range(rounds):
        row["alone"].append(statistics.median(contender.step() for _ in range(alone)))
        held, steps, path = contender.save(in_background=True)
        if not steps:
            raise BenchmarkError("a checkpoint is written within two steps; take more --layers.")
        row["while_writing"].append(statistics.median(steps))
        row["counted_steps"].append(len(steps))
        row["save_in_background"].append(held)
        row["save_waited_for"].append(contender.save(in_background=False)[0])
    written = sum(file.stat().st_size for file in path.parent.glob("step_*/*"))
    return {
        "checkpoint_mib": round(written / _MIB, 1),
        "slower": round(median_ratio(row["while_writing"], row["alone"]) - 1, 4),
        "held_up": round(median_ratio(row["save_in_background"], row["save_waited_for"]), 4),
        "seconds": row,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "hidden": row["hidden"],
                "checkpoint, MiB": f"{row['checkpoint_mib']:,.0f}",
                "step alone, ms": f"{statistics.median(row['seconds']['alone']) * 1e3:.0f}",
                "while one is written": f"{row['slower']:+.1%}",
                "save(), s": f"{statistics.median(row['seconds']['save_in_background']):.2f}",
                "save() waited for, s": f"{statistics.median(row['seconds']['save_waited_for']):.2f}",
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
        description="Steps while a checkpoint is written, and how long save() holds the training up.",
        epilog="example: python -m tools.bench.saving --out runs/bench",
    )
    add_output_options(parser, name="saving")
    parser.add_argument(
        "--hidden", nargs="+", type=int, default=[256, 512], help="widths (256 512)"
    )
    parser.add_argument("--layers", type=int, default=28, help="decoder layers (28)")
    parser.add_argument("--token-share", type=float, default=0.03125, help="of 7B's tokens (1/32)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--alone", type=int, default=5, help="steps alone in a round (5)")
    options = parser.parse_args(arguments)
    return run_benchmark(
        options, name="saving", measure=lambda: _measure_widths(options), table=_table
    )


if __name__ == "__main__":
    sys.exit(main())
