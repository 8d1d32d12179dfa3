# SPDX-License-Identifier: Apache-2.0
"""README and docs tell the truth: commands, options, files, links, tests and code blocks in them exist and run."""

import ast
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache

import pytest

from megatron_eve.data.sample import Pack
from tests.repo.tree import REPO, commands, documents, text_of
from tests.support.warm_python import warm_python

MAX_README_LINES = 220
SHELL_WORDS = {"mkdir", "git", "cd"}
HEAVY = {"torch", "megatron.core", "transformers", "streaming", "matplotlib", "scipy"}


def python_commands() -> list[list[str]]:
    """[module, argument, ...] of every `python -m` in shell blocks, quoted values included; what stands behind `--`
    (slurm.jobs) is a command of its own."""
    found = []
    for document in documents():
        for command in commands(document):
            for match in re.finditer(r"python3? -m ([^\"]+)", command):
                words = shlex.split(match[1])
                split = words.index("--") if "--" in words else len(words)
                found += [part for part in (words[:split], words[split + 1 :]) if part]
    return found


@cache
def help_text(*module_and_subcommands: str) -> str:
    measures_torch = module_and_subcommands[0].startswith("tools.bench")
    python = [warm_python()] if measures_torch else [sys.executable, "-X", "importtime"]
    command = [*python, "-m", *module_and_subcommands, "--help"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    if not measures_torch:
        slow = HEAVY & imported
        assert not slow, f"{' '.join(command)} imports {slow} before it knows what is asked"
    return result.stdout


def subcommands(words: list[str]) -> list[str]:
    """The leading words of a command line that its help offers as COMMAND or KIND."""
    path = [words[0]]
    for word in words[1:]:
        text = help_text(*path)
        if not re.search(rf"^ {{2,6}}{re.escape(word)}(\s|$)", text, flags=re.M) or not re.search(
            r"^usage: .*(COMMAND|KIND)", text, flags=re.M
        ):
            break
        path.append(word)
    return path


@pytest.mark.timeout(600)
def test_documented_commands_exist_with_their_options() -> None:
    words_of_commands = [words for words in python_commands() if words[0] != "pytest"]
    assert len(words_of_commands) > 10
    for words in words_of_commands:
        text = help_text(*subcommands(words))
        for option in (word.split("=")[0] for word in words if word.startswith("--")):
            assert option in text, f"{' '.join(words)}: its help does not know {option}"


def test_documented_make_targets_exist() -> None:
    targets = {
        t
        for d in documents()
        for t in re.findall(r"\bmake ([a-z][a-z0-9-]+)", "\n".join(commands(d)))
    }
    assert {"demo", "test"} <= targets
    targets |= set(re.findall(r"`make ([a-z0-9-]+)`", text_of("README.md")))
    for target in targets:
        assert re.search(rf"^{target}:", text_of("Makefile"), flags=re.M), f"make {target}"


def test_every_documented_command_is_of_a_known_kind() -> None:
    """A new kind of command needs a test of its own here."""
    known = ("make ", "python", "pip install ", "sbatch ", *SHELL_WORDS)
    for document in documents():
        for command in commands(document):
            bare = re.sub(r"^([A-Z_0-9]+=(\"[^\"]*\"|\S+) )+", "", command)
            assert bare.startswith(known), f"{document}: {command}"


def test_documented_sbatch_files_exist() -> None:
    paths = {p for d in documents() for p in re.findall(r"\bslurm/\w+\.sbatch", text_of(d))}
    assert paths
    assert [p for p in paths if not (REPO / p).is_file()] == []


def test_pins_are_used_in_every_documented_installation() -> None:
    lines = [c for d in documents() for c in commands(d) if "pip install" in c]
    assert lines
    assert [line for line in lines if "-c constraints.txt" not in line] == []


def test_files_named_in_backticks_exist() -> None:
    missing = []
    for document in documents():
        for path in re.findall(
            r"`((?:megatron_eve|data_prep|checkpoints_convert|slurm|tools|tests|docs)/[\w./-]+)`",
            text_of(document),
        ):
            if not (REPO / path).exists():
                missing.append(f"{document}: {path}")
    assert missing == []


def test_links_lead_somewhere() -> None:
    missing = []
    for document in [*documents(), "CONTRIBUTING.md", "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", text_of(document)):
            if (
                not target.startswith("https://")
                and not (REPO / document).parent.joinpath(target).exists()
            ):
                missing.append(f"{document}: {target}")
    assert missing == []


def test_tree_in_the_readme_is_the_tree() -> None:
    (block,) = re.findall(r"^```\n(megatron_eve/ .*?)^```", text_of("README.md"), flags=re.M | re.S)
    parents: list[str] = []
    for line in block.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+) +\S.*", line).groups()  # type: ignore[union-attr]
        parents = [*parents[: len(indent) // 2], name]
        assert (REPO / "".join(parents)).exists(), "".join(parents)


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= MAX_README_LINES


def test_named_tests_exist() -> None:
    named = {
        (d, *m) for d in documents() for m in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(d))
    }
    assert len(named) > 30
    missing = []
    for document, path, name in sorted(named):
        tree = (
            ast.parse(text_of(path))
            if (REPO / path).is_file()
            else ast.Module(body=[], type_ignores=[])
        )
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        if name not in functions:
            missing.append(f"{document}: {path}::{name}")
    assert missing == []


def test_every_invariant_names_a_test() -> None:
    lines = [line for line in text_of("docs/invariants.md").splitlines() if line.startswith("- ")]
    assert [line for line in lines if not re.search(r"`tests/[\w/]+\.py::\w+`$", line)] == []


def test_every_field_of_a_pack_is_explained() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", text_of("docs/one-batch.md"), flags=re.M)
    assert documented == [field.name for field in fields(Pack)]


@pytest.mark.parametrize("document", [d for d in documents() if "```python\n" in text_of(d)])
def test_python_blocks_run(document: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text_of(document), flags=re.M | re.S):
        exec(compile(block, document, "exec"), {})


def test_the_start_page_leads_to_every_page() -> None:
    pages = {d.removeprefix("docs/") for d in documents() if re.fullmatch(r"docs/[\w-]+\.md", d)}
    linked = re.findall(r"\]\(([\w-]+\.md)\)", text_of("docs/README.md"))
    assert sorted(linked) == sorted(pages - {"README.md"}), "each page once"
