# SPDX-License-Identifier: Apache-2.0
"""The summary of the slow groups: what counts as good, what is said of a group that did not run."""

import os
import re
from pathlib import Path

import pytest

from tests.repo.tree import text_of
from tests.support import nightly
from tests.support.nightly import GROUPS, Outcome, outcome_of, summary

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="9" failures="1" errors="2"
skipped="3" time="12.6"><testcase name="a"/></testsuite></testsuites>"""


def test_counts_are_pytests(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(JUNIT)
    found = outcome_of(tmp_path / "a.xml")
    assert found == Outcome(passed=3, failed=3, skipped=3, seconds=12.6)
    assert not found.is_good


def test_a_group_without_tests_is_not_good() -> None:
    assert not Outcome(skipped=4).is_good
    assert Outcome(passed=1, skipped=4).is_good


def test_what_did_not_run_says_why() -> None:
    text = summary(
        "2026-01-01",
        {"kill": Outcome(passed=2, seconds=3.4), "slurm": Outcome(left_out="needs root")},
    )
    assert text.splitlines()[-2:] == [
        "| kill | 2 | 0 | 0 | 3 |",
        "| slurm | left out: needs root | | | |",
    ]


def test_slurm_is_left_out_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert nightly.left_out("slurm") == "needs root"
    assert nightly.left_out("matrix") == ""


def test_every_marker_is_a_group() -> None:
    """But `gpu`, which has its own environment and command."""
    (excluded,) = re.findall(r"addopts = \"-m '([^']+)'", text_of("pyproject.toml"))
    assert set(re.findall(r"not (\w+)", excluded)) == {*GROUPS, "gpu"}
