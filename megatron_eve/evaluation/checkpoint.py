# SPDX-License-Identifier: Apache-2.0
"""Evaluate a checkpoint of a running training: convert it, ask it, write a flat metrics.json.

    python -m megatron_eve.evaluation.checkpoint runs/mine/checkpoints/step_00000400 OUT --easy-vqa FOLDER
    python -m megatron_eve.evaluation.checkpoint runs/mine/checkpoints/step_00000400 OUT --tasks pope,mme

Made for `evaluation.command` of a run, with {checkpoint} and {out} in the places of both folders. The released folder
is removed again; answers and results stay in OUT. Exit codes: 0 metrics.json is written, 1 a step failed, 2 wrong
usage."""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import EveError
from megatron_eve.evaluation.results import Figure, read_results
from megatron_eve.run_files import EVALUATION_METRICS
from megatron_eve.whole import write_json

RELEASED = "evaluated_release"


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    arguments = _parse(argv)
    released = arguments.out / RELEASED
    try:
        for command in commands(arguments, released=released):
            if code := subprocess.run([sys.executable, "-m", *command]).returncode:
                raise EveError(f"{' '.join(command)}: exit {code}")
        metrics = flat([f for path in results(arguments.out) for f in read_results(path)])
    finally:
        shutil.rmtree(released, ignore_errors=True)
    write_json(arguments.out / EVALUATION_METRICS, metrics)
    print(f"wrote {len(metrics)} metrics to {arguments.out / EVALUATION_METRICS}")
    return 0


def commands(arguments: argparse.Namespace, *, released: Path) -> list[list[str]]:
    """Arguments of `python -m`, one list a step."""
    out = arguments.out
    convert = [
        "megatron_eve.checkpoints_convert",
        "megatron-to-hf",
        str(arguments.checkpoint),
        str(released),
    ]
    if arguments.tokenizer is not None:
        convert += ["--tokenizer", str(arguments.tokenizer)]
    found = [[*convert, "--overwrite"]]
    batch = ["--batch-size", str(arguments.batch_size)]
    if arguments.easy_vqa is not None:
        own = [
            "megatron_eve.evaluation.easy_vqa",
            str(released),
            str(arguments.easy_vqa),
            str(out),
            *batch,
        ]
        found.append(
            own + ([] if arguments.images is None else ["--images", str(arguments.images)])
        )
    if arguments.tasks is not None:
        ask = ["megatron_eve.evaluation.lmms_eval", str(released), "--tasks", arguments.tasks]
        rule = arguments.resize_rule or "eval"
        found.append([*ask, "--out", str(out), *batch, "--resize-rule", rule])
    return found


def results(out: Path) -> list[Path]:
    """Results of our evaluator, and the newest of lmms-eval."""
    own = [path for path in [out / "results.json"] if path.is_file()]
    return own + sorted(out.rglob("*_results.json"))[-1:]


def flat(figures: Sequence[Figure]) -> dict[str, float]:
    """`task/metric` -> value; easy-VQA's names without their common part."""
    return {_name(figure): figure.value for figure in figures}


def _name(figure: Figure) -> str:
    task = figure.task.removeprefix("easy-VQA: ")
    return task if task != figure.task else f"{task}/{figure.metric}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.evaluation.checkpoint",
        description="Evaluate a checkpoint of a running training and write a flat metrics.json.",
        epilog="example: python -m megatron_eve.evaluation.checkpoint runs/mine/checkpoints/step_00000400 eval-400 "
        "--easy-vqa runs/demo/data/easy-vqa --images 50",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, or run directory")
    parser.add_argument("out", type=Path, help="folder for metrics.json, answers and results")
    parser.add_argument("--easy-vqa", type=Path, metavar="FOLDER", help="ask its test questions")
    parser.add_argument("--images", type=int, metavar="N", help="of easy-VQA; default: all")
    parser.add_argument("--tasks", help="of lmms-eval, joined by commas")
    parser.add_argument("--resize-rule", choices=("train", "eval"),
                        help="of --tasks (default eval)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=64, help="questions (default 64)")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's")
    arguments = parser.parse_args(argv)
    if arguments.easy_vqa is None and arguments.tasks is None:
        parser.error("nothing to ask: give --easy-vqa or --tasks")
    if arguments.images is not None and arguments.easy_vqa is None:
        parser.error("--images N is of --easy-vqa, which is not given")
    if arguments.resize_rule is not None and arguments.tasks is None:
        parser.error("--resize-rule is of --tasks, which is not given")
    return arguments


if __name__ == "__main__":
    end_with(main)
