# SPDX-License-Identifier: Apache-2.0
"""`python -m checkpoints_convert` as a user types it: exit codes, last lines, errors."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints_convert.__main__ import main
from tests.checkpoints_convert.conftest import release_model, write_reference_release
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import DENSE


def run_main(*arguments: object) -> tuple[int, list[str], str]:
    """In a worker: exit code, lines of stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return code, out.getvalue().splitlines(), err.getvalue()


@pytest.fixture
def command(gloo1: Any) -> Any:
    """Run one command line in a worker process."""
    return lambda *arguments: gloo1.run(run_main, *arguments)[0]


def test_from_folder_to_folder(
    full_release: tuple[Path, ReferenceEve], tmp_path: Path, command: Any
) -> None:
    folder = full_release[0]
    dest, back = tmp_path / "megatron", tmp_path / "back"
    code, lines, _ = command("hf-to-megatron", folder, dest, "--dry-run")
    checked = "tensors, all checked by name, shape and dtype; nothing written to"
    assert (code, lines[-1]) == (0, f"57 {checked} {dest}")
    assert len(lines) == 58
    assert not dest.exists()
    code, lines, _ = command("hf-to-megatron", folder, dest)
    assert (code, lines[-1]) == (0, f"wrote 37 fp32 tensors to {dest}")
    for dry in ((), ("--dry-run",)):
        code, lines, errors = command("hf-to-megatron", folder, dest, *dry)
        assert code == 2
        assert "megatron exists; choose another name or pass --overwrite" in errors
    assert command("hf-to-megatron", folder, dest, "--overwrite", "--dry-run")[0] == 0
    assert command("hf-to-megatron", folder, dest, "--overwrite")[0] == 0
    code, lines, _ = command("verify", folder, dest)
    assert code == 0
    assert lines[-1].endswith("all the same")

    code, _, errors = command("megatron-to-hf", dest, back, "--image-edge", 16)
    assert code == 2
    assert "names no tokenizer" in errors
    arguments = ("megatron-to-hf", dest, back, "--image-edge", 16, "--tokenizer", folder)
    code, lines, _ = command(*arguments, "--dry-run")
    assert (code, lines[-1]) == (0, f"37 {checked} {back}")
    assert not back.exists()
    code, lines, _ = command(*arguments, "--max-shard-gb", 1e-4)
    assert code == 0
    assert lines[-1].endswith(f"MB of weights, processor and code to {back}")
    assert len(list(back.glob("*.safetensors"))) > 1
    code, _, errors = command(*arguments)
    assert code == 2
    assert "back exists" in errors


def test_verify_finds_one_changed_value(
    full_release: tuple[Path, ReferenceEve], tmp_path: Path, command: Any
) -> None:
    folder = full_release[0]
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    code, lines, _ = command("verify", folder, other, "--logits")
    assert code == 0
    assert "differ by 0 at most: within the limit 1e-05" in lines[-1]
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][3] += 1
    save_file(state, other / "model.safetensors")
    code, lines, _ = command("verify", folder, other)
    assert code == 1
    assert lines[0] == "model.norm.weight: 1 of 32 values differ, by 1 at most"
    assert lines[-1].endswith("1 differ")
    assert command("verify", folder, other, "--logits")[0] == 1
    assert command("verify", folder, other, "--logits", "--tolerance", 1e9)[0] == 0

    (other / "config.json").write_text("{}")
    reasons = {
        other: f"{other} cannot be loaded by transformers' Auto classes",
        tmp_path / "nothing": f"no folder {tmp_path / 'nothing'}",
    }
    for unloadable, reason in reasons.items():
        code, _, errors = command("verify", folder, unloadable, "--logits")
        assert (code, errors.count("\n")) == (1, 1)
        assert f"error: {reason}" in errors

    del state["model.norm.weight"]
    save_file(state, other / "model.safetensors")
    code, lines, _ = command("verify", other, folder)
    assert code == 1
    assert lines[0] == f"model.norm.weight: only in {folder}"
    assert command("verify", other, folder, "--allow-extra")[0] == 0
    assert command("verify", folder, other, "--allow-extra")[0] == 1


def test_wrong_usage(tmp_path: Path, command: Any) -> None:
    code, _, errors = command("hf-to-megatron", tmp_path, tmp_path / "out", "--split", "norm,heads")
    assert code == 2
    assert "'heads' is no component; use all, or some of norm,attention,ffn" in errors
    assert command("hf-to-megatron", tmp_path)[0] == 2
    for name, option in (
        ("hf-to-megatron", "--vocab-size"),
        ("hf-to-megatron", "--patch-embed-dim"),
        ("megatron-to-hf", "--image-edge"),
    ):
        code, _, errors = command(name, tmp_path, tmp_path / "out", option, 0)
        assert code == 2
        assert f"argument {option}: 0 is not at least 1" in errors
    assert command("verify", tmp_path, tmp_path)[0] == 1


def test_a_tokenizer_that_is_too_large_is_refused_in_time(
    full_release: tuple[Path, ReferenceEve], tmp_path: Path, command: Any
) -> None:
    """Also for the official layout, whose loader would add random rows, and in a dry run."""
    small, options = tmp_path / "small", ("--tokenizer", full_release[0], "--image-edge", 16)
    assert command("hf-to-megatron", full_release[0], small, "--vocab-size", 100)[0] == 0
    for extra in ((), ("--dry-run",), ("--layout", "official")):
        code, _, errors = command("megatron-to-hf", small, tmp_path / "out", *options, *extra)
        assert (code, errors.count("\n")) == (1, 1)
        assert "has ids up to 319, the model 100 rows" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_heads_that_the_official_code_cannot_build_are_refused_in_time(
    tokenizer_folder: Path, tmp_path: Path, command: Any
) -> None:
    model = dataclasses.replace(release_model(DENSE, tokenizer_folder), head_dim=16)
    folder = write_reference_release(tmp_path / "wide", build_reference(model), tokenizer_folder)
    assert command("hf-to-megatron", folder, tmp_path / "megatron")[0] == 0
    arguments = ("megatron-to-hf", tmp_path / "megatron", tmp_path / "out", "--image-edge", 16)
    options = ("--tokenizer", tokenizer_folder, "--layout", "official")
    for extra in ((), ("--dry-run",)):
        code, _, errors = command(*arguments, *options, *extra)
        assert (code, errors.count("\n")) == (1, 1)
        assert "32 / 4 for the size of a head, this model has 16; use --layout automodel" in errors
    assert not (tmp_path / "out").exists()


def test_overwrite_through_a_link(
    full_release: tuple[Path, ReferenceEve], tmp_path: Path, command: Any
) -> None:
    """What the link points to is replaced, as often as one likes; the link stays."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        arguments = ("hf-to-megatron", full_release[0], tmp_path / "link", "--overwrite")
        assert command(*arguments)[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "complete.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    file = tmp_path / "disk" / "config.txt"
    code, _, errors = command("hf-to-megatron", full_release[0], file, "--overwrite")
    assert (code, file.is_file()) == (2, True)
    assert "config.txt is a file; choose another name" in errors


def test_as_a_module() -> None:
    """--help of each command, with its example."""
    for name in ("hf-to-megatron", "megatron-to-hf", "release", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "checkpoints_convert", name, "--help"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0
        assert f"python -m checkpoints_convert {name} " in " ".join(done.stdout.split())
