# SPDX-License-Identifier: Apache-2.0
"""The groups of tests that `make test` leaves out, one after the other: python -m tests.support.nightly [--out DIR].

Writes DIR/YYYY-MM-DD.md with a line for each group: passed, failed, skipped, seconds, or why it was left out, and
beside it pytest's own JUnit file and log of each. Exit code 1 if a group failed or ran no test."""

import argparse
import datetime
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GROUPS = ("slow", "matrix", "kill", "slurm")
"""Their markers; `gpu` has its own environment and command."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Of one group. `left_out` says why it did not run; then nothing else counts."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    left_out: str = ""

    @property
    def is_good(self) -> bool:
        return bool(self.left_out) or (self.passed > 0 and self.failed == 0)


def run_group(group: str, *, folder: Path) -> Outcome:
    """Runs the group's tests in a process of their own."""
    report = folder / f"{group}.xml"
    report.unlink(missing_ok=True)  # of an earlier run on this day
    command = [sys.executable, "-m", "pytest", "-m", group, "tests", f"--junit-xml={report}"]
    with (folder / f"{group}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    found = outcome_of(report) if report.exists() else Outcome(failed=1)
    return Outcome(failed=1) if code and found.is_good else found


def outcome_of(report: Path) -> Outcome:
    """What pytest's JUnit file says; an error in a fixture is a failure. Where each test was skipped, the first says
    why the group was left out."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    if total and skipped == total:
        return Outcome(left_out=next(suites[0].iter("skipped")).get("message", "each skipped"))
    return Outcome(
        passed=total - failures - errors - skipped,
        failed=failures + errors,
        skipped=skipped,
        seconds=sum(float(suite.get("time", 0)) for suite in suites),
    )


def summary(date: str, outcomes: dict[str, Outcome]) -> str:
    """The dated page: one row a group."""
    lines = [f"# Slow tests, {date}", "", "| group | passed | failed | skipped | seconds |"]
    lines.append("|---|---|---|---|---|")
    for group, found in outcomes.items():
        cells = (
            f"left out: {found.left_out} | | | |"
            if found.left_out
            else f"{found.passed} | {found.failed} | {found.skipped} | {found.seconds:.0f} |"
        )
        lines.append(f"| {group} | {cells}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """All groups; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.nightly")
    parser.add_argument("--out", type=Path, default=Path("runs/nightly"))
    out = parser.parse_args(argv).out
    date = datetime.date.today().isoformat()
    folder = out / date
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for group in GROUPS:
        print(f"{group} ...", flush=True)
        outcomes[group] = run_group(group, folder=folder)
        (out / f"{date}.md").write_text(summary(date, outcomes))
    print(summary(date, outcomes), end="")
    print(f"written: {out / date}.md, {folder}/")
    return 0 if all(found.is_good for found in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
