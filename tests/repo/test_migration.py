# SPDX-License-Identifier: Apache-2.0
"""docs/migration.md: every flag of the official training scripts has a row, every key that a row names exists, every
official defect has a row with a test, and so has every difference on purpose."""

import json
import re
from typing import Any

from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import flatten
from tests.repo.tree import text_of

OFFICIAL: dict[str, Any] = json.loads(text_of("tests/golden/official/training_flags.json"))
NUM_DEFECTS = 21


def rows(heading: str) -> list[list[str]]:
    """Cells of all table rows between this heading and the next."""
    section = text_of("docs/migration.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def first_cells(heading: str) -> list[str]:
    """Every name in backticks in the first cells of a section."""
    return [name for row in rows(heading) for name in re.findall(r"`([^`]+)`", row[0])]


def test_every_official_flag_has_a_row() -> None:
    expected = {f"--{flag}" for flag in OFFICIAL["training_flags"] + OFFICIAL["launcher_flags"]}
    expected |= set(OFFICIAL["fields_without_a_flag"]) | set(OFFICIAL["environment"])
    assert len(OFFICIAL["training_flags"]) == 39
    assert set(first_cells("Flags")) == expected


def test_every_flag_of_the_official_evaluation_has_a_row() -> None:
    """And what a row offers instead is an option of our command, or said to be none."""
    named = first_cells("Flags of the evaluation")
    assert sorted(named) == sorted(OFFICIAL["evaluation_flags"] + OFFICIAL["evaluation_options"])
    assert len(OFFICIAL["evaluation_flags"]) == 34
    ours = text_of("megatron_eve/evaluation/lmms_eval/__main__.py") + text_of(
        "megatron_eve/generate.py"
    )
    for row in (row for row in rows("Flags of the evaluation") if row[0].startswith("`")):
        assert row[2], row[0]
        for option in re.findall(r"`(?:-- )?(--[\w-]+)`", row[1]):
            assert option in (*re.findall(r"\"(--[\w-]+)\"", ours), "--gen_kwargs"), row[0]


def test_every_key_of_a_row_exists_or_its_absence_is_explained() -> None:
    keys = set(flatten(load_recipe("eve7b_stage2_2")))
    for row in rows("Flags"):
        if not re.match(r"`(--)?\w+`$", row[0]):
            continue
        if row[1] == "-":
            assert len(row[2]) > 10, f"{row[0]}: say why there is none"
        named = re.findall(r"`((?:[a-z_]+\.)+[a-z_0-9.]+|run_dir)`", " ".join(row[1:]))
        sections = {key.split(".")[0] for key in keys}
        for key in (name for name in named if name.split(".")[0] in sections):
            assert key in keys, f"{row[0]} names {key}"
        assert row[1] == "-" or any(key in keys for key in named), row[0]


def test_every_defect_has_a_row_and_a_test() -> None:
    """That the named tests exist is tests/repo/test_docs.py's."""
    found = [row for row in rows("Defects of the official code") if row[0].isdigit()]
    assert [int(row[0]) for row in found] == list(range(1, NUM_DEFECTS + 1))
    for row in found:
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row[3]), row[0]
        assert row[1] and row[2]


def test_every_difference_on_purpose_has_both_sides_and_a_test() -> None:
    """That the named tests exist is tests/repo/test_docs.py's."""
    found = rows("Where we differ on purpose")[1:]
    assert len(found) >= 5
    for subject, there, here, shown in found:
        assert subject and there and here, subject
        assert re.search(r"`tests/[\w/]+\.py::\w+`", shown), subject
