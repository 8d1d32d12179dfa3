# SPDX-License-Identifier: Apache-2.0
"""`make test-fast`: the tests of what was changed, without the slowest: under a minute on two cores.

What was changed: `git diff` against where this branch left origin/main (HEAD, without one), uncommitted and untracked
files included; or FILES. FOLDERS says which tests a folder of the source has; a changed test is its own; a file of
tests/support/ has the tests that import it. It prints what it runs and what it leaves out, and runs pytest.

    python -m tests.support.affected [--list] [FILE ...]
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.repo.tree import REPO, files, text_of

FOLDERS: dict[str, tuple[str, ...]] = {
    "megatron_eve/": ("tests/config", "tests/training", "tests/repo", "tests/test_whole.py"),
    "megatron_eve/config/": ("tests/config", "tests/metrics/test_flops.py"),
    "megatron_eve/data/": ("tests/data",),
    "megatron_eve/model/": ("tests/model",),
    "megatron_eve/kernels/": ("tests/kernels", "tests/model/test_attention.py"),
    "megatron_eve/parallel/": ("tests/parallel", "tests/model/test_zigzag.py"),
    "megatron_eve/optim/": ("tests/optim", "tests/checkpoint/test_exact_restart.py"),
    "megatron_eve/training/": ("tests/training",),
    "megatron_eve/checkpoint/": ("tests/checkpoint",),
    "megatron_eve/metrics/": ("tests/metrics",),
    "megatron_eve/inference/": ("tests/inference",),
    "megatron_eve/evaluation/": ("tests/evaluation",),
    "checkpoints_convert/": ("tests/checkpoints_convert",),
    "data_prep/": ("tests/data_prep",),
    "slurm/": ("tests/slurm",),
    "tools/": ("tests/tools",),
    "tools/demo/": ("tests/tools/test_demo.py", "tests/tools/test_demo_*.py"),
    "tools/plan/": ("tests/tools/test_plan_*.py",),
    "tools/profile/": ("tests/tools/test_profile_*.py",),
    "tools/bench/": ("tests/tools/test_bench*.py",),
    "docs/": ("tests/repo/test_docs.py", "tests/repo/test_trips.py"),
    "tests/golden/": ("tests/data/test_official_text.py", "tests/model/test_te_signatures.py"),
    "": ("tests/repo",),
}
"""Tests by the start of a changed path; the longest start counts, "" for all other files."""
ALWAYS = ("tests/repo/test_style.py", "tests/repo/test_imports.py")
SLOW = (
    "tests/checkpoint/test_faults.py",
    "tests/checkpoints_convert/test_roundtrip.py",
    "tests/data/test_packing_figures.py",
    "tests/evaluation/test_lmms_plugin.py",
    "tests/parallel/test_invariances.py",
    "tests/repo/test_interrupts.py",
    "tests/repo/test_packaging.py",
    "tests/repo/test_readme_commands.py",
    "tests/repo/test_wheel.py",
    "tests/tools/test_bench.py",
    "tests/tools/test_compare_commits.py",
    "tests/tools/test_demo.py::test_the_whole_path",
    "tests/tools/test_profile_capture.py",
    "tests/training/test_kill_points.py",
    "tests/training/test_run.py",
    "tests/training/test_watchdog.py",
)
"""Files, or tests in them, that take more than fifteen seconds; `make test` runs them."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is run, and what is not though the change touches it."""

    run: tuple[str, ...]
    left_out: tuple[str, ...]


def changed_files() -> list[str]:
    """Paths below the repository, as git tells them."""
    base = _git("merge-base", "HEAD", "origin/main") or ["HEAD"]
    return sorted(
        {
            *_git("diff", "--name-only", base[0]),
            *_git("ls-files", "--others", "--exclude-standard"),
        }
    )


def tests_of(path: str) -> set[str]:
    """Test files for one changed file."""
    if re.fullmatch(r"tests/.*/test_\w+\.py", path):
        return {path}
    if path.startswith("tests/") and not path.startswith("tests/golden/"):
        folder = path.rpartition("/")[0]
        return _importers(path) | (_matching(folder) if path.endswith("conftest.py") else set())
    start = max((f for f in FOLDERS if path.startswith(f)), key=len)
    return {test for pattern in FOLDERS[start] for test in _matching(pattern)}


def choose(paths: Iterable[str]) -> Choice:
    """Test files of all changed files, and those that every change has."""
    touched = {test for path in paths for test in tests_of(path)} | set(ALWAYS)
    there = {test for test in touched if (REPO / test).is_file()}
    slow = {name for name in SLOW if name.split("::")[0] in there}
    return Choice(run=tuple(sorted(there - slow)), left_out=tuple(sorted(slow)))


def _matching(pattern: str) -> set[str]:
    """A file, all of a folder, or the files that a pattern with * names."""
    wanted = re.compile(re.escape(pattern).replace(r"\*", "[^/]*") + r"(/.*)?")
    return {f for f in _test_files() if wanted.fullmatch(f)}


def _importers(path: str) -> set[str]:
    """Test files that import a module of tests/ themselves."""
    module = path.removesuffix(".py").replace("/", ".")
    return {f for f in _test_files() if re.search(rf"\b{re.escape(module)}\b", text_of(f))}


def _test_files() -> list[str]:
    return [f for f in files(".py") if f.startswith("tests/") and "/test_" in f]


def _git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=REPO, capture_output=True, text=True)
    return done.stdout.splitlines()


def main(argv: Sequence[str]) -> int:
    """Exit code of pytest."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.affected")
    parser.add_argument("files", nargs="*", metavar="FILE", help="in place of what git says")
    parser.add_argument("--list", action="store_true", help="say what would run, run nothing")
    asked, pytest_arguments = parser.parse_known_args(argv)
    choice = choose(asked.files or changed_files())
    print("runs:", *(f"  {test}" for test in choice.run), sep="\n", flush=True)
    if choice.left_out:
        print(
            "left out, as they take long (`make test` runs them):",
            *(f"  {test}" for test in choice.left_out),
            sep="\n",
            flush=True,
        )
    if asked.list:
        return 0
    deselected = [word for test in choice.left_out if "::" in test for word in ("--deselect", test)]
    command = [sys.executable, "-m", "pytest", *choice.run, *deselected, *pytest_arguments]
    return subprocess.run(command, cwd=REPO).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
