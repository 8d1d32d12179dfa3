# SPDX-License-Identifier: Apache-2.0
"""Run lmms-eval on a released folder with the plugin of this package.

    python -m megatron_eve.evaluation.lmms_eval releases/eve-7b --tasks pope,gqa --out runs/eval --batch-size 8

Gives lmms-eval the plugin, its tasks and its options, and is stricter: lmms-eval exits 0 after an error, this exits 1
unless results were written. Arguments after `--` go to lmms-eval as they are. Exit codes:
0 results are written, 1 they are not, 2 wrong usage."""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, EveError

TASKS = Path(__file__).parent / "tasks"
PLUGIN = "megatron_eve.evaluation.lmms_eval"
INSTALL = "`make install-eval`, or pip install -c constraints.txt --no-deps lmms-eval after the `eval` set"


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    behind = given.index("--") if "--" in given else len(given)
    arguments = _parse(given[:behind])
    if importlib.util.find_spec("lmms_eval") is None:
        raise ConfigError(f"lmms-eval is not installed; {INSTALL}")
    before = _results(arguments.out)
    command = command_line(arguments, further=given[behind + 1 :])
    path = os.pathsep.join(filter(None, [str(TASKS.parents[3]), os.environ.get("PYTHONPATH")]))
    plugin = {"LMMS_EVAL_PLUGINS": PLUGIN, "PYTHONPATH": path}
    code = subprocess.run(command, env=os.environ | plugin).returncode
    written = sorted(_results(arguments.out) - before)
    if code != 0 or not written:
        raise EveError(f"lmms-eval wrote no results to {arguments.out} (exit {code})")
    print(f"wrote {', '.join(map(str, written))}")
    return 0


def command_line(arguments: argparse.Namespace, *, further: Sequence[str]) -> list[str]:
    """lmms-eval's own command line."""
    options = {
        "pretrained": arguments.folder,
        "resize_rule": arguments.resize_rule,
        "repetition_penalty": arguments.repetition_penalty,
        "template": arguments.template,
        "dtype": arguments.dtype,
    }
    return [
        sys.executable, "-m", "lmms_eval", "--model", "eve",
        "--model_args", ",".join(f"{name}={value}" for name, value in options.items()),
        "--include_path", str(TASKS),
        "--tasks", arguments.tasks,
        "--batch_size", str(arguments.batch_size),
        "--output_path", str(arguments.out),
        "--log_samples",
        *further,
    ]  # fmt: skip


def _results(out: Path) -> set[Path]:
    return set(out.rglob("*_results.json"))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.evaluation.lmms_eval",
        description="Run lmms-eval on a released folder; what stands behind -- goes to it as it is.",
        epilog="example: python -m megatron_eve.evaluation.lmms_eval releases/eve-7b --tasks pope --out runs/eval",
    )
    parser.add_argument("folder", type=Path, help="released Hugging Face folder")
    parser.add_argument(
        "--tasks", required=True, help="of lmms-eval, joined by commas; easy_vqa is ours"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and answers")
    parser.add_argument("--batch-size", type=int, default=1, help="questions (default 1)")
    parser.add_argument(
        "--resize-rule", choices=("train", "eval"), default="eval", help="default eval, as official"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="default 1.0, none; the official scripts inherit 1.05",
    )
    parser.add_argument(
        "--template",
        choices=("qwen2", "plain"),
        default="qwen2",
        help="plain: a caption, whatever the question (default qwen2)",
    )
    parser.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
        help="default auto, as stored",
    )  # fmt: skip
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_with(main)
