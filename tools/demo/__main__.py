# SPDX-License-Identifier: Apache-2.0
"""Run a demonstration: python -m tools.demo eve-tiny|smollm2 --out FOLDER

From raw data to the answers of a released model about images that it has never seen, and the control: the same model
and questions with the wrong image. You may interrupt it; the same command goes on where it stopped, and does nothing
when all is done. Exit codes: 0 done and the model sees, 1 a step failed or the model does not see, 2 wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError
from megatron_eve.evaluation.easy_vqa import RESULTS_FILE
from tools.demo.pipelines import DEMOS, Demo, DemoOptions
from tools.demo.steps import plan_lines, run_steps, step_seconds
from tools.demo.summary import summarise
from tools.process import sigterm_interrupts


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one demonstration and return the exit code."""
    arguments = _parser().parse_args(argv)
    out: Path = arguments.out
    demo = DEMOS[arguments.demo](_options(arguments))
    _check_stop_after(arguments.stop_after, demo)
    if arguments.dry_run:
        print("\n".join(plan_lines(demo.steps, out=out)))
        print(f"dry run: {len(demo.steps)} steps, nothing was written to {out}")
        return 0
    with sigterm_interrupts():
        is_complete = run_steps(demo.steps, out=out, stop_after=arguments.stop_after)
    if not is_complete:
        print(f"stopped after {arguments.stop_after}; wrote the steps up to it to {out}")
        return 0
    return _conclude(demo, out=out)


def _conclude(demo: Demo, *, out: Path) -> int:
    """Show the results; whether the model sees decides the exit code."""
    lines = summarise(step_seconds(demo.steps, out=out), demo.stages, out=out)
    print("\n" + "\n".join(lines))
    for name in demo.reports:
        print("\n" + (out / name).read_text().rstrip())
    results = json.loads((out / RESULTS_FILE).read_text())
    print(flush=True)
    if not results["met"]:
        print(f"error: not met: {'; '.join(results['shortfalls'])}", file=sys.stderr, flush=True)
    print(f"wrote {', '.join(demo.reports)}, samples.md, curves.png, summary.md and hf/ to {out}")
    return 0 if results["met"] else 1


def _check_stop_after(name: str | None, demo: Demo) -> None:
    names = [step.name for step in demo.steps]
    if name is not None and name not in names:
        raise ConfigError(f"--stop-after {name} is no step; choose one of {', '.join(names)}.")


def _options(arguments: argparse.Namespace) -> DemoOptions:
    for option in ("train_images", "test_images"):
        value = getattr(arguments, option)
        if value is not None and value < 2:
            raise ConfigError(f"--{option.replace('_', '-')} {value} is too few; give 2 or more.")
    return DemoOptions(
        out=arguments.out,
        overrides=tuple(arguments.override),
        train_images=arguments.train_images,
        test_images=arguments.test_images,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo",
        description="From raw data to a released model that answers questions about images.",
        epilog="example: python -m tools.demo eve-tiny --out runs/demo",
    )
    parser.add_argument("demo", choices=tuple(DEMOS), help="smollm2 takes about 25 GB of disk")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="run folder")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="section.key=value",
        help="change a field of every training run's recipe; may be repeated",
    )
    parser.add_argument(
        "--train-images", type=int, metavar="N", help="train on the first N; default: all 4,000"
    )
    parser.add_argument(
        "--test-images", type=int, metavar="N", help="ask about the first N; default: all 1,000"
    )
    parser.add_argument("--stop-after", metavar="STEP", help="end when this step is done")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the steps and their commands, write nothing"
    )
    return parser


if __name__ == "__main__":
    end_with(main, after_interrupt="run the same command again to go on")
