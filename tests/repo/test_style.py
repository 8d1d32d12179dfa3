# SPDX-License-Identifier: Apache-2.0
"""House rules that a linter does not know. Each test lists every offender."""

import ast
import re

from tests.repo.tree import REPO, files, python_files, text_of

SPDX = "SPDX-License-Identifier: Apache-2.0"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
UNFINISHED = re.compile(
    r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]) + r")\b"
)
DEVELOPER_PATH = re.compile(r"(?<![\w.])/(work|home|root|Users|tmp/eve)/")
WITH_LICENCE = files(
    ".py", ".sh", ".sbatch", ".toml", ".yaml", "Makefile", ".ci/run", "constraints.txt"
)
SOURCES = files(
    ".py", ".sh", ".sbatch", ".md", ".toml", ".yaml", ".ci/run", "Makefile", "constraints.txt"
)


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    """`path:number: line` of every line in the sources that matches."""
    return [
        f"{path}:{number}: {line}"
        for path in SOURCES
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if pattern.search(line)
    ]


def test_licence_line_comes_first() -> None:
    missing = [p for p in WITH_LICENCE if SPDX not in "".join(text_of(p).splitlines()[:2])]
    assert missing == [], f"start with `# {SPDX}`"
    assert (REPO / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_modules_say_what_they_are() -> None:
    trees = {path: ast.parse(text_of(path)) for path in python_files(tests=True)}
    assert [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []


def test_files_are_short() -> None:
    counts = {path: len(text_of(path).splitlines()) for path in python_files(tests=False)}
    too_long = {path: count for path, count in counts.items() if count > MAX_FILE_LINES}
    assert too_long == {}, f"at most {MAX_FILE_LINES} lines; split by what a file knows"


def test_functions_are_short() -> None:
    too_long: dict[str, int] = {}
    for path in python_files(tests=True):
        for node in ast.walk(ast.parse(text_of(path))):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno is not None
            ):
                count = node.end_lineno - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    too_long[f"{path}:{node.name}"] = count
    assert too_long == {}, f"at most {MAX_FUNCTION_LINES} lines a function"


def test_nothing_is_left_unfinished() -> None:
    assert lines_with(UNFINISHED) == []


def test_no_path_of_somebodys_machine() -> None:
    assert lines_with(DEVELOPER_PATH) == []


def test_no_file_is_named_for_nothing() -> None:
    nameless = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert [p for p in files(".py") if p.rsplit("/", 1)[-1] in nameless] == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert UNFINISHED.search("# TO" + "DO: later")
    assert DEVELOPER_PATH.search('open("/home' + '/me/x")')
    assert not DEVELOPER_PATH.search("a/home/b and https://x.org/work/y")
