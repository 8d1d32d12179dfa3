# SPDX-License-Identifier: Apache-2.0
"""`make test-fast` chooses the tests of what was changed: every folder of the product has some, every name is right."""

import re
from pathlib import PurePosixPath

import pytest

from tests.repo.tree import REPO, python_files, text_of
from tests.support import affected
from tests.support.affected import FOLDERS, SLOW, changed_files, choose


def test_every_folder_of_the_product_is_in_the_map() -> None:
    folders = {str(PurePosixPath(path).parent) + "/" for path in python_files(tests=False)}
    missing = {f for f in folders if f != "./" and not any(f.startswith(k) for k in FOLDERS if k)}
    assert missing == set()
    below = {f for f in folders if re.fullmatch(r"megatron_eve/\w+/", f)}
    assert len(below) > 8
    assert below - set(FOLDERS) == set(), "a part of the library has tests of its own"


def test_every_name_in_the_map_is_one_of_the_tree() -> None:
    assert [f for f in FOLDERS if not (REPO / f).is_dir()] == []
    for patterns in FOLDERS.values():
        for pattern in patterns:
            assert affected._matching(pattern), pattern
    for name in SLOW:
        path, _, test = name.partition("::")
        assert (REPO / path).is_file(), name
        assert f"def {test}(" in text_of(path) or not test, name


@pytest.mark.parametrize("path", python_files(tests=False))
def test_every_file_has_tests(path: str) -> None:
    assert affected.tests_of(path)


def test_choice() -> None:
    assert affected.tests_of("megatron_eve/optim/adam.py") == {
        "tests/optim/test_adam.py",
        "tests/optim/test_frozen_memory.py",
        "tests/checkpoint/test_exact_restart.py",
    }
    assert affected.tests_of("tools/plot.py") > {"tests/tools/test_plot.py"}
    assert "tests/tools/test_plot.py" not in affected.tests_of("tools/plan/rates.py")
    assert affected.tests_of("tests/data/test_plan.py") == {"tests/data/test_plan.py"}
    assert "tests/training/test_kill_points.py" in affected.tests_of("tests/support/zygote.py")
    assert affected.tests_of("tests/training/conftest.py") > {"tests/training/test_loss.py"}
    choice = choose(["tests/training/test_run.py", "tests/tools/test_demo.py", "gone/file.py"])
    assert "tests/training/test_run.py" in choice.left_out
    assert "tests/tools/test_demo.py" in choice.run, "without the one slow test in it"
    assert "tests/tools/test_demo.py::test_the_whole_path" in choice.left_out
    assert set(affected.ALWAYS) < set(choice.run)
    assert choose([]).run == tuple(sorted(affected.ALWAYS))


def test_list_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert affected.main(["--list", "megatron_eve/training/run.py"]) == 0
    runs, left_out = capsys.readouterr().out.split("left out")
    assert "  tests/training/test_loss.py\n" in runs
    assert "  tests/training/test_run.py\n" in left_out


def test_changed_files_are_paths_of_the_tree() -> None:
    assert all(not path.startswith("/") for path in changed_files())


def test_the_commit_hook_runs_no_test_that_starts_an_installation() -> None:
    (entry,) = re.findall(r"entry: python -m pytest (.*)", text_of(".pre-commit-config.yaml"))
    paths = [word for word in entry.split() if not word.startswith("-")]
    assert paths
    for path in paths:
        assert (REPO / path).is_file()
        assert not re.search(r"\bpip\b|\bmake\b|venv", text_of(path)), path
