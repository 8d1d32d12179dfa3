# SPDX-License-Identifier: Apache-2.0
"""Recipes outside the package: a function of a user's file, a run's config.txt; and what the command prints of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config.recipes import RECIPES, load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ConfigError
from megatron_eve.train import main
from tools.plan.__main__ import main as plan
from tools.profile.__main__ import main as profile

FILE = """
from dataclasses import replace
from megatron_eve.config.recipes import load_recipe

def tuned():
    config = load_recipe("eve_tiny_stage1")
    return replace(config, optim=replace(config.optim, peak_lr=3e-4))

def elsewhere():
    return replace(tuned(), run_dir="scratch/mine")

def number():
    return 7

def needs_one(x):
    return x

def broken():
    return load_recipe("eve_tiny_stage1").optimizer
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my recipes.py"
    path.write_text(FILE)
    return path


def test_a_function_lays_its_values_over_a_recipe(file: Path) -> None:
    base = load_recipe("eve_tiny_stage1")
    assert load_recipe(f"{file}:tuned") == replace(
        base, recipe="tuned", run_dir="runs/tuned", optim=replace(base.optim, peak_lr=3e-4)
    )


def test_a_folder_that_the_function_names_stays(file: Path) -> None:
    assert load_recipe(f"{file}:elsewhere").run_dir == "scratch/mine"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("absent.py:run", r"absent\.py does not exist"),
        (
            "{file}:tune",
            r"has no function 'tune'; it has tuned, elsewhere, number, needs_one, broken",
        ),
        ("{file}:load_recipe", r"has no function 'load_recipe'"),
        ("{file}:number", r"number returned int; expected a RunConfig"),
        (
            "{file}:broken",
            r"my recipes\.py:19: AttributeError: 'RunConfig' object has no attribute",
        ),
        ("{file}", r"there is no recipe '.*my recipes\.py'.*FILE\.py:FUNCTION"),
        ("{folder}/absent.txt", r"absent\.txt cannot be read: No such file"),
        ("{folder}/other.txt", r"other\.txt: line 1 of the configuration is 'hello'"),
        ("{folder}/syntax.py:run", r"syntax\.py:1: SyntaxError"),
        ("{folder}/leaves.py:run", r"leaves\.py:1: SystemExit: 3"),
        ("{file}:needs_one", r"needs_one\(\) missing 1 required positional argument"),
    ],
)
def test_what_is_wrong_is_named(file: Path, reference: str, message: str) -> None:
    (file.parent / "other.txt").write_text("hello")
    (file.parent / "syntax.py").write_text("def run(:")
    (file.parent / "leaves.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=message):
        load_recipe(reference.format(file=file, folder=file.parent))


def test_a_file_imports_from_its_own_folder(file: Path) -> None:
    (file.parent / "a_sibling_of_it.py").write_text(
        "from megatron_eve.config.recipes import load_recipe as get"
    )
    text = "def run():\n    from a_sibling_of_it import get\n    return get('eve_tiny_text')\n"
    (file.parent / "importing.py").write_text(text)
    assert load_recipe(f"{file.parent / 'importing.py'}:run").recipe == "run"


@pytest.mark.parametrize("name", RECIPES)
def test_the_text_of_a_run_is_its_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.txt"
    path.write_text(config_text(load_recipe(name)))
    assert load_recipe(str(path)) == load_recipe(name)


def test_list_names_each_recipe_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in lines)


def test_list_takes_nothing_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eve_tiny_stage1", "--list"])
    assert "--list takes nothing beside it, found eve_tiny_stage1" in capsys.readouterr().err


def test_planner_and_profiler_take_them(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["eve7b_stage1", "--cluster", "16x8xA100-40G"]) == 0
    ours = capsys.readouterr().out
    text = config_text(load_recipe("eve7b_stage1"))
    (file.parent / "config.txt").write_text(text)
    assert plan([str(file.parent / "config.txt"), "--cluster", "16x8xA100-40G"]) == 0
    assert capsys.readouterr().out == ours
    assert profile(["command", f"{file}:tuned", "--steps", "5-6@0"]) == 0
    line = capsys.readouterr().out
    assert "run_dir=runs/tuned" in line
    assert "--output=runs/tuned/profile/rank0000" in line


@pytest.mark.parametrize(
    ("running", "override", "line"),
    [
        (None, "parallel.num_nodes=1", "torchrun --nproc-per-node 2 -m megatron_eve.train eve_tiny_text"),
        ("2", "batch.size=8 parallel.num_nodes=4",
         "torchrun --nnodes 4 --node-rank N --master-addr FIRST_NODE --nproc-per-node 2 -m"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_processes_is_told_with_the_line_that_is_right(
    running: str | None, override: str, line: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if running:
        monkeypatch.setenv("WORLD_SIZE", running)
    monkeypatch.setattr("megatron_eve.train.check_start", lambda config, dry_run: None)
    arguments = ["eve_tiny_text", *override.split(), "run_dir=runs/a b"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"\n  {line}" in error
    assert error.rstrip().endswith(f"eve_tiny_text {override} 'run_dir=runs/a b'")


def test_show_prints_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eve_tiny_stage1", "optim.peak_lr=3e-4", "--show"]) == 0
    assert "optim.peak_lr: 0.0003\n" in capsys.readouterr().out


def test_diff_prints_the_fields_that_differ(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--diff", "eve_tiny_stage1", f"{file}:tuned", "run_dir=x", "train.seed=3"]) == 0
    changed = [line for line in capsys.readouterr().out.splitlines() if line[1:2].isalpha()]
    assert changed == [
        "-optim.peak_lr: 0.001",
        "+optim.peak_lr: 0.0003",
        "-recipe: eve_tiny_stage1",
        "+recipe: tuned",
    ]


def test_equal_recipes_have_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--diff", "eve_tiny_stage1", "eve_tiny_stage1"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [[], ["--show"], ["--dry-run"]])
def test_without_a_recipe_the_usage_says_what_to_name(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "RECIPE is missing" in capsys.readouterr().err


def test_the_documented_example_is_accepted_with_its_override(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "running.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "my_recipes.py"
    file.write_text(example)
    assert main([f"{file}:my_run", "--show"]) == 0
    assert "optim.peak_lr: 0.0003\n" in capsys.readouterr().out
    assert main([f"{file}:my_run", "optim.peak_lr=5e-5", "--show"]) == 0
    assert "optim.peak_lr: 5e-05\n" in capsys.readouterr().out
