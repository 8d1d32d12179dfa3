# SPDX-License-Identifier: Apache-2.0
"""Capture steps of a training run and read them: python -m tools.profile COMMAND ...

    command  print what each rank executes              exec     become it (slurm/rank.sh, EVE_PROFILE)
    run      capture a short run here, then report      report   RUN_DIR/profile -> report.json, report.md, timeline.png
    compare  two reports; fails when the second is slower than allowed

Exit codes: 0 done, 1 a capture cannot be read, a run failed, or `compare` found it slower, 2 wrong usage."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors
from megatron_eve.config.recipes import load_recipe
from megatron_eve.run_files import PROFILE_FOLDER
from megatron_eve.whole import write_json

from .compare import (
    changes,
    comparison_table,
    differences,
    is_report,
    parse_share,
    slower_by,
)
from .launch import (
    become,
    has_nsys,
    parse_window,
    rank_command,
    run_dir_of,
    shell_line,
)
from .render import draw_timeline, markdown
from .report import REPORT, load, make_report
from .trace import ProfileError

TRAINER = ("-m", "megatron_eve.train")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    arguments = _parse(argv)
    return int(arguments.act(arguments))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes overrides before the options only; here they may stand after them, too."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _command(arguments: argparse.Namespace) -> int:
    window = parse_window(arguments.steps)
    run_dir = f"run_dir={load_recipe(arguments.recipe).run_dir}"
    training = [sys.executable, *TRAINER, arguments.recipe, run_dir, *arguments.overrides]
    for rank in window.ranks:
        nsys = arguments.tool == "nsys"
        print(shell_line(rank_command(training, window=window, rank=rank, nsys=nsys)))
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    window, rank = parse_window(arguments.steps), int(os.environ.get("RANK", "0"))
    nsys = has_nsys(os.environ)
    command = rank_command(arguments.training, window=window, rank=rank, nsys=nsys)
    if nsys:  # it does not make the folder of its report
        (run_dir_of(command) / PROFILE_FOLDER).mkdir(parents=True, exist_ok=True)
    become(command)
    return 1


def _run(arguments: argparse.Namespace) -> int:
    from .local import run_here

    folder = run_here(
        arguments.recipe,
        window=parse_window(arguments.steps),
        out=arguments.out,
        overrides=arguments.overrides,
        overwrite=arguments.overwrite,
    )
    return _write_report(folder, out=folder, overwrite=True, peak_tflops=None)


def _report(arguments: argparse.Namespace) -> int:
    return _write_report(
        arguments.folder,
        out=arguments.out or arguments.folder,
        overwrite=arguments.overwrite,
        peak_tflops=arguments.peak_tflops,
    )


def _write_report(folder: Path, *, out: Path, overwrite: bool, peak_tflops: float | None) -> int:
    target = out / REPORT
    if target.exists() and not overwrite:
        raise ProfileError(f"{target} exists; add --overwrite to replace it or choose --out.")
    captured = load(folder)
    report = make_report(captured, peak_flops=peak_tflops * 1e12 if peak_tflops else None)
    out.mkdir(parents=True, exist_ok=True)
    write_json(target, report)
    text = markdown(report)
    (out / "report.md").write_text(text)
    draw_timeline([one.figures for one in captured], out=out / "timeline.png")
    print(text)
    print(f"wrote {REPORT}, report.md and timeline.png to {out}")
    return 0


def _read_report(path: Path) -> dict[str, Any]:
    file = path / REPORT if path.is_dir() else path
    try:
        report: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ProfileError(
            f"{file} is no report ({error}); make one: python -m tools.profile report {path}"
        ) from error
    if not is_report(report):
        raise ProfileError(
            f"{file} is no report with tokens per second; make one: python -m tools.profile report {path}"
        )
    return report


def _compare(arguments: argparse.Namespace) -> int:
    allowed = parse_share(arguments.fail_over)
    before, after = _read_report(arguments.before), _read_report(arguments.after)
    print(comparison_table(changes(before, after), limit=arguments.lines))
    for difference in differences(before, after):
        print(f"note: {difference}")
    slower = slower_by(before, after)
    verdict = f"a useful token takes {100 * slower:+.1f}% of the time before"
    if slower > allowed:
        print(f"slower: {verdict}, allowed is {100 * allowed:+.1f}%", file=sys.stderr)
        return 1
    print(f"{verdict}, allowed is {100 * allowed:+.1f}%")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.profile",
        description="Capture steps of a training run with Nsight Systems or torch.profiler, and read them.",
        epilog="example: python -m tools.profile report runs/eve7b_stage2_2/profile",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _add(commands, "command", _command, "print the exact command of each captured rank")
    command.add_argument("recipe", metavar="RECIPE")
    command.add_argument("overrides", metavar="section.key=value", nargs="*")
    command.add_argument("--tool", choices=("nsys", "kineto"), default="nsys")
    _add_steps(command)

    execute = _add(
        commands, "exec", _exec, "become a training command with its capture, on one rank"
    )
    execute.add_argument("training", metavar="TRAINING", nargs="+", help="after --: the command")
    _add_steps(execute)

    run = _add(commands, "run", _run, "capture a short run on this machine, then report")
    run.add_argument("recipe", metavar="RECIPE")
    run.add_argument("overrides", metavar="section.key=value", nargs="*")
    run.add_argument("--out", type=Path, required=True, metavar="RUN_DIR", help="folder of the run")
    run.add_argument("--overwrite", action="store_true", help="delete RUN_DIR if it exists")
    _add_steps(run)

    report = _add(commands, "report", _report, "RUN_DIR/profile -> JSON, Markdown, PNG")
    report.add_argument("folder", metavar="RUN_DIR/profile", type=Path)
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: beside the captures")
    report.add_argument(
        "--peak-tflops", type=float, metavar="N", help="of one device, where none is known"
    )
    report.add_argument("--overwrite", action="store_true", help="replace a report that exists")

    compare = _add(commands, "compare", _compare, "two reports; exit 1 when the second is slower")
    compare.add_argument("before", type=Path, metavar="A", help="report.json, or its folder")
    compare.add_argument("after", type=Path, metavar="B")
    compare.add_argument(
        "--fail-over",
        default="5%",
        metavar="SHARE",
        help="allowed time per useful token; default: 5%%",
    )
    compare.add_argument("--lines", type=int, default=40, metavar="N", help="rows to print")
    return parser


def _add(commands: Any, name: str, act: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(act=act)
    return parser


def _add_steps(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", default="10-12", metavar="FIRST-LAST[@RANKS]", help="default: 10-12 of rank 0"
    )


if __name__ == "__main__":
    end_with(main)
