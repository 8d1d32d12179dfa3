# SPDX-License-Identifier: Apache-2.0
"""The summary of the slow groups: what counts as good, what is said of a group that did not run."""

import re
import subprocess
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


def test_a_group_whose_tests_were_all_skipped_was_left_out(tmp_path: Path) -> None:
    text = """<testsuites><testsuite tests="1" failures="0" errors="0" skipped="1" time="0.1"><testcase name="a">
    <skipped type="pytest.skip" message="not root">x</skipped></testcase></testsuite></testsuites>"""
    (tmp_path / "a.xml").write_text(text)
    assert outcome_of(tmp_path / "a.xml") == Outcome(left_out="not root")


@pytest.mark.parametrize("code", [2, 3, 5])
def test_a_run_that_broke_is_a_failure(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier run of the day has left a good report."""
    (tmp_path / "slow.xml").write_text('<testsuites><testsuite tests="1" time="1"/></testsuites>')
    done = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(nightly.subprocess, "run", lambda *args, **kwargs: done)
    assert nightly.run_group("slow", folder=tmp_path) == Outcome(failed=1)


def test_every_marker_is_a_group() -> None:
    """But `gpu`, which has its own environment and command."""
    (excluded,) = re.findall(r"addopts = \"-m '([^']+)'", text_of("pyproject.toml"))
    assert set(re.findall(r"not (\w+)", excluded)) == {*GROUPS, "gpu"}
