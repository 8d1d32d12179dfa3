# SPDX-License-Identifier: Apache-2.0
"""Every command of the README is run as it stands there, by this file or by the place that this file names.

Commands about data and models run in one workspace, in the README's order, with a small model and two dozen captions
under the names that the README uses."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ENVIRONMENT, installed_packages, pytest_sessionfinish
from tests.repo.tree import REPO, commands, text_of

SMALL_RUN = (
    *("run_dir=runs/eve7b_stage3", "data.sources.0.path=data/captions/shards"),
    *("data.tokenizer=data/tokenizer-qwen2.5", "data.template=qwen2", "data.pack_tokens=256"),
    *("data.max_text_tokens=128", "data.image_edge=96"),
    *("model.vocab_size=152064", "model.num_layers=1", "model.hidden_size=32"),
    *("model.ffn_hidden_size=64", "model.head_dim=8", "model.patch_embed_dim=32"),
    *("parallel.gpus_per_node=1", "parallel.tensor=1", "train.steps=1"),
    "checkpoint.load_weights_from=none",
)
INSTALLED_BY_MAKE = (
    "-c constraints.txt -e '.[cpu]'",
    "-c constraints.txt --no-deps mosaicml",
)
ELSEWHERE = {
    "pip install ": ("tests/repo/test_packaging.py", "test_the_two_documented_lines_suffice"),
}
"""Start of a command -> file and test that run it in an environment of the user's own."""
SBATCH = """#!/bin/bash
set -e
bash -n "$1"
grep -q '^#SBATCH --output=logs/' "$1"
cd "$CHECKOUT"
exec "$PYTHON" -m megatron_eve.train "eve7b_$(basename "$1" .sbatch)" "${@:2}" --dry-run
"""
"""Stands for Slurm: takes the file and its arguments as sbatch does, and asks the trainer whether it would start."""


def run(command: str, *, cwd: Path, code: int = 0, **environment: str) -> str:
    """Run one line as the README has it, with this interpreter; returns what it printed."""
    prefix = f"{shlex.quote(sys.executable)} "
    line = prefix + command.removeprefix("python ") if command.startswith("python ") else command
    env = os.environ | {"PYTHONPATH": str(REPO)} | environment
    result = subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=env, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == code, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout


MARKER = re.compile(r"^\w+_SET := \$\(VENV\)/(\S+)$", re.MULTILINE)
"""A line of the Makefile that names what is left when a set of packages is installed."""
STAND_IN = """#!/bin/sh
echo "$*" >> {calls}
case "$*" in *"-m pip"*|*"-m venv"*) echo "a test must not install: $*" >&2; exit 97;; esac
exec {python} "$@"
"""
"""Python of a finished environment: notes its calls, refuses to install, else is this interpreter."""


def finished_environment(folder: Path) -> Path:
    """A folder that make takes for a finished environment, whatever sets the Makefile has."""
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.write_text(STAND_IN.format(calls=folder / "calls", python=shlex.quote(sys.executable)))
    python.chmod(0o755)
    now = time.time()
    for name in MARKER.findall(text_of("Makefile")):
        (folder / name).touch()
        os.utime(folder / name, (now, now))  # none older than one that it is made from
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_environment(tmp_path_factory.mktemp("venv"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, images and a Qwen2.5-shaped model where the README expects them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("workspace")
    (folder / "images").mkdir()
    samples = []
    for number in range(24):
        Image.new("RGB", (64, 96), (10 * number, 90, 200)).save(folder / f"images/{number}.png")
        turns = [("human", "<image>\n"), ("gpt", f"Picture number {number}.")]
        conversation = [{"from": role, "value": text} for role, text in turns]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (folder / "captions.json").write_text(json.dumps(samples))
    config = Qwen2Config(
        vocab_size=152064, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "models/Qwen2.5-7B-Instruct")
    return folder


def data_and_models() -> list[str]:
    starts = (
        "python -m data_prep ",
        "python -m checkpoints_convert ",
        "python -m megatron_eve.generate ",
    )
    return [command for command in commands("README.md") if command.startswith(starts)]


@pytest.mark.timeout(600)
def test_from_captions_to_a_release(workspace: Path) -> None:
    """Tokenizer, shards and weights by the README's lines, one step of a small run, export and question."""
    *before, export, ask = data_and_models()
    assert len(before) == 3
    for command in before:
        run(command, cwd=workspace)
    run(f"python -m megatron_eve.train eve_tiny_stage3 {' '.join(SMALL_RUN)}", cwd=workspace)
    run(export, cwd=workspace)
    assert (workspace / "data/weights/qwen2.5-7b-instruct").is_dir()
    assert (workspace / "releases/eve-7b/model.safetensors").is_file()
    run(ask, cwd=workspace)  # a model of one step may well say nothing


def run_make(command: str, installed: Path, tmp_path: Path) -> None:
    """The target's own command with a bound on its work: the demo's first step, the collection of the tests."""
    bounds = {
        "RUN": str(tmp_path / "run"),
        "DEMO_ARGS": "--train-images 40 --test-images 8 --stop-after easy-vqa",
        "PYTEST_ARGS": "--collect-only -q tests/repo",
    }
    arguments = " ".join(shlex.quote(f"{name}={value}") for name, value in bounds.items())
    printed = run(f"{command} VENV={installed} {arguments}", cwd=REPO)
    calls = (installed / "calls").read_text()
    assert "-m tools.demo" in calls or "-m pytest" in calls
    assert "-m pip" not in calls
    expected = "stopped after easy-vqa" if "demo" in command else "test_readme_commands.py"
    assert expected in printed


def test_an_environment_that_lacks_a_set_is_not_filled_by_a_test(tmp_path: Path) -> None:
    """Were a marker forgotten above, make would call pip: it is refused, and the test fails."""
    unfinished = finished_environment(tmp_path)
    (unfinished / ".installed-eval").unlink()
    run(f"make test VENV={unfinished} PYTEST_ARGS=--version", cwd=REPO, code=2)
    assert "-m pip" in (unfinished / "calls").read_text()


def test_a_session_that_changes_its_environment_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found = installed_packages()
    assert "pytest" in found
    session: Any = SimpleNamespace(stash={ENVIRONMENT: found}, exitstatus=0)
    pytest_sessionfinish(session)
    assert session.exitstatus == 0
    session.stash[ENVIRONMENT] = found | {"intruder": "1.0 None"}
    pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert "intruder" in capsys.readouterr().out


def plan(command: str, installed: Path, tmp_path: Path) -> None:
    assert "128 = 16 nodes x 8" in run(command, cwd=REPO)


def submit(command: str, installed: Path, tmp_path: Path) -> None:
    assert "dry run" in run(command, cwd=REPO)


def batch(command: str, installed: Path, tmp_path: Path) -> None:
    """With a stand-in for sbatch; tests/slurm/test_cluster.py runs the same lines on a Slurm."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "slurm").symlink_to(REPO / "slurm")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "CHECKOUT": str(REPO),
    }
    printed = run(command, cwd=tmp_path, **environment)
    assert (tmp_path / "logs").is_dir() if "mkdir" in command else "128 = 16 nodes x 8" in printed


RUNNERS: dict[str, Callable[[str, Path, Path], None]] = {
    "make ": run_make,
    "python -m megatron_eve.train ": plan,
    "python -m slurm.submit ": submit,
    "mkdir ": batch,
    "sbatch ": batch,
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", commands("README.md"))
def test_every_command_is_run(command: str, installed: Path, tmp_path: Path) -> None:
    """Here, in the test above, or where ELSEWHERE says; a command that nothing runs fails."""
    bare = command.removeprefix("TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu ")
    for start, runner in RUNNERS.items():
        if bare.startswith(start):
            runner(command, installed, tmp_path)
            return
    for start, (path, name) in ELSEWHERE.items():
        if bare.startswith(start):
            assert f"def {name}(" in text_of(path)
            return
    assert bare in data_and_models(), f"nothing runs {command!r}: give it a runner here"


def test_make_installs_by_the_documented_lines(tmp_path: Path) -> None:
    """So that CI, which calls `make test`, runs what a user with an environment of their own types."""
    url = "https://download.pytorch.org/whl/cpu"
    line = f"make --dry-run test VENV={tmp_path}"
    printed = run(line, cwd=REPO, TORCH_INDEX_URL=url)
    assert f"--index-url {url} torch" in printed
    readme = [c.removeprefix("pip install ") for c in commands("README.md") if "pip install" in c]
    assert len(readme) == len(INSTALLED_BY_MAKE)
    for documented, start in zip(readme, INSTALLED_BY_MAKE, strict=True):
        assert documented.startswith(start)
        assert f"install {documented}" in printed
