# SPDX-License-Identifier: Apache-2.0
"""docs/one-checkpoint.md names a file and a function for each step: both exist, and no part of the trip is left out."""

import ast
import re

from tests.repo.tree import text_of

ROW = re.compile(r"^\| [\w ]+ \| `([\w/]+\.py)` \| `(\w+)` \| .+ \|$", flags=re.M)


def test_each_step_is_found_by_name() -> None:
    rows = ROW.findall(text_of("docs/one-checkpoint.md"))
    assert (
        len(rows)
        == len(re.findall(r"^\| (?!step|-)", text_of("docs/one-checkpoint.md"), flags=re.M))
        > 20
    )
    missing = [
        f"{path}: {name}"
        for path, name in rows
        if name not in {
            node.name for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.FunctionDef)
        }
    ]  # fmt: skip
    assert missing == []


def test_the_trip_of_a_batch_names_every_file_that_drives_it() -> None:
    text = text_of("docs/one-batch.md")
    for file in ("plan/lengths.py", "plan/order.py", "pack_builder.py", "loader.py"):
        assert f"`megatron_eve/data/{file}`" in text
