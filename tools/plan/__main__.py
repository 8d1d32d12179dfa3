# SPDX-License-Identifier: Apache-2.0
"""Layouts of a recipe on a cluster, and calibration: python -m tools.plan RECIPE --cluster 16x8xA100-40G

Without a calibration file the constants are assumptions from data sheets. `python -m tools.plan calibrate RUN_DIR ...`
fits them to measured runs; what `--check` names is predicted and not fitted.

Exit codes: 0 done, 1 a prediction of --check is off by more than --within, 2 wrong usage, or nothing fits."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors

from .cluster import GPUS, WORKSPACE


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_calibration = words[:1] == ["calibrate"]
    parser = _calibrate_parser() if is_calibration else _plan_parser()
    options = parser.parse_args(words[1:] if is_calibration else words)
    from .commands import calibrate, show_plan  # numpy and torch: not for --help

    return calibrate(options) if is_calibration else show_plan(options)


def _plan_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description="Layouts of a recipe that fit a cluster: memory by part, step time, days, what limits each.",
        epilog="example: python -m tools.plan eve7b_stage2_2 --cluster 16x8xA100-40G. Constants from measured runs: "
        "python -m tools.plan calibrate RUN_DIR ... [--check RUN_DIR ...] [--within PERCENT] [--gpu GPU] [--out FILE]",
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--cluster", required=True, metavar="NODESxGPUSxGPU", help=", ".join(GPUS))
    parser.add_argument("--nvlink-gbs", type=float, metavar="GB/s", help="one direction of one GPU")
    parser.add_argument("--network-gbs", type=float, metavar="GB/s", help="one direction of a node")
    parser.add_argument("--mix", metavar="VISION+TEXT[/LABELS]", help="tokens of an average sample")
    parser.add_argument("--samples", type=int, metavar="N", help="of the stage, for its days")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="instead of assumptions")
    parser.add_argument("--workspace-gb", type=float, default=WORKSPACE / 1e9, metavar="GB")
    parser.add_argument("--show", type=int, default=8, metavar="N", help="layouts to print (8)")
    parser.add_argument("--json", action="store_true", help="all that fit, as JSON")
    return parser


def _calibrate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan calibrate",
        description="Fit the constants of the time model to measured runs.",
        epilog="example: python -m tools.plan calibrate runs/a runs/b --check runs/c --out calibration.json",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folder with config.txt and metrics.jsonl, or JSON of tools.bench.step or tools.bench.gpu",
    )
    parser.add_argument(
        "--check", nargs="*", default=[], type=Path, metavar="RUN", help="to predict"
    )
    parser.add_argument("--within", type=float, default=10.0, metavar="PERCENT", help="default: 10")
    parser.add_argument("--gpu", metavar="GPU", help="that the runs had; default: a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="calibration to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    return parser


if __name__ == "__main__":
    end_with(main)
