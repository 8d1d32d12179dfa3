# SPDX-License-Identifier: Apache-2.0
"""Train: `python -m megatron_eve.train RECIPE [section.key=value ...] [--dry-run]`.

RECIPE is a name (`--list`), a function of your own file (`my_recipes.py:my_run`) or a run's `config.txt`. On one
process as it is; on several under torchrun or the files in slurm/. Exit codes: 0 the run is done or was asked to stop
(RUN_DIR/DONE tells which) or the dry run is printed, 1 the run failed, 2 wrong usage or configuration, 130 Ctrl-C
before the first step, or a second one.
"""

import argparse
import difflib
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from megatron_eve.command import end_with, exit_code, reports_errors
from megatron_eve.config.layout_checks import refuse_other_process_count
from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.resolve import resolve
from megatron_eve.config.run_summary import plan_text
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ElsewhereError, EveError
from megatron_eve.start_checks import check_start
from megatron_eve.stop_signals import StopSignals

EXAMPLE = """example:
  python -m megatron_eve.train eve7b_stage2_2 optim.peak_lr=1e-5 --dry-run
  torchrun --nproc-per-node 2 -m megatron_eve.train eve_tiny_stage2_2 run_dir=runs/mine"""


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parse(argv)
    _log_to_stderr()
    if args.list:
        print(_recipes())
        return 0
    if args.diff:
        print(_difference(*args.diff, overrides=args.overrides), end="")
        return 0
    config = configure(args.recipe, overrides=args.overrides)
    if args.show:
        print(config_text(config), end="")
        return 0
    check_start(config, dry_run=args.dry_run)
    if args.dry_run:
        print(config_text(config))
        print(plan_text(config, epoch=None))
        return 0
    refuse_other_process_count(
        config.parallel,
        running=int(os.environ.get("WORLD_SIZE", 1)),
        arguments=sys.argv[1:] if argv is None else argv,
    )
    return _train(config)


def configure(recipe: str, *, overrides: Sequence[str]) -> RunConfig:
    """Recipe, overrides, checks. Raises: ConfigError."""
    return resolve(apply_overrides(load_recipe(recipe), overrides))


def _recipes() -> str:
    """Each recipe with the first paragraph of its docstring."""
    width = max(map(len, RECIPES))
    lines = []
    for name, function in RECIPES.items():
        summary = (inspect.getdoc(function) or "").partition("\n\n")[0]
        lines.append(f"{name:{width}}  {' '.join(summary.split())}")
    return "\n".join(lines)


def _difference(first: str, second: str, *, overrides: Sequence[str]) -> str:
    """A line for each field in which two configurations differ, as `diff` writes it; nothing if they are equal."""
    texts = (config_text(configure(name, overrides=overrides)) for name in (first, second))
    before, after = (text.splitlines(keepends=True) for text in texts)
    return "".join(difflib.unified_diff(before, after, first, second, n=0))


def _train(config: RunConfig) -> int:
    # One sample is tokenized at a time; threads for it would only warn, should a library fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without
        os.environ.setdefault(
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0"
        )  # megatron-core refuses TE without
    rank = int(os.environ.get("RANK", 0))
    with StopSignals(rank=rank) as signals:
        from megatron_eve.metrics.background import is_left_behind
        from megatron_eve.training.run import run  # torch and megatron-core: not for a dry run

        try:
            run(config, signals=signals)
        except Exception as error:
            code = exit_code(error)
            if not isinstance(error, ElsewhereError):
                print(f"rank {rank}: {_told(error, signals)}", file=sys.stderr)
        else:
            if not is_left_behind():
                return 0
            code = 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # destructors of a wedged communicator can hang for ever


def _told(error: Exception, signals: StopSignals) -> str:
    """An error of ours, or of a rank that was interrupted together with its peers, as one line; a defect in full."""
    if isinstance(error, EveError) or signals.interrupted:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if signals.interrupted else error}"
    return f"\n{traceback.format_exc()}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.train",
        description="Train one stage of EVEv2 as a recipe says.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recipe", nargs="?", help="a name, FILE.py:FUNCTION, or the config.txt of a run"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="changes to the recipe"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the resolved plan and exit")
    instead.add_argument("--list", action="store_true", help="print the names of all recipes")
    instead.add_argument("--show", action="store_true", help="print every field of the recipe")
    instead.add_argument(
        "--diff", nargs=2, metavar=("A", "B"), help="print the fields in which two recipes differ"
    )
    args = parser.parse_args(argv)
    if args.diff and args.recipe:  # with --diff all others are overrides
        args.overrides.insert(0, args.recipe)
    if args.list and args.recipe:
        parser.error(f"--list takes nothing beside it, found {args.recipe}")
    if not (args.recipe or args.list or args.diff):
        parser.error("RECIPE is missing: a name (--list), FILE.py:FUNCTION, or a run's config.txt")
    return args


def _log_to_stderr() -> None:
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank} %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("megatron").setLevel(logging.WARNING)


if __name__ == "__main__":
    end_with(main)
