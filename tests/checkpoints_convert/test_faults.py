# SPDX-License-Identifier: Apache-2.0
"""One test for each thing that happens to a conversion: a damaged checkpoint, a full disk, a folder that must not be
written, a run that goes on meanwhile, shards that contradict each other. One clear line, and nothing is left behind."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert import megatron_to_hf
from checkpoints_convert.__main__ import main
from checkpoints_convert.megatron_folder import canonical_hash, read_megatron
from megatron_eve.checkpoint.manifest import read_manifest
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.generate import main as generate
from tests.checkpoints_convert.test_command_line import run_main
from tests.checkpoints_convert.test_roundtrip import resave
from tests.support.reference_eve import ReferenceEve
from tests.support.tiny import layout

FullRelease = tuple[Path, ReferenceEve]
FULL_DISK, FULL_AT_SYNC, NO_PERMISSION = "full disk", "full at sync", "no permission"


@pytest.fixture(scope="module")
def imported(full_release: FullRelease, gloo1: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:  # fmt: skip
    """What the converter wrote."""
    folder = tmp_path_factory.mktemp("faults") / "imported"
    assert gloo1.run(run_main, "hf-to-megatron", full_release[0], folder)[0][0] == 0
    return folder


@pytest.fixture(scope="module")
def run_dir(
    full_release: FullRelease,
    imported: Path,
    tokenizer_folder: Path,
    gloo1: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run whose trainer saved a checkpoint after step 5, with the hashes of its canonical tensors."""
    recipe = load_recipe("eve_tiny_stage3")
    run = dataclasses.replace(
        recipe,
        model=full_release[1].config,
        data=dataclasses.replace(recipe.data, tokenizer=str(tokenizer_folder), image_edge=48),
    )
    folder = tmp_path_factory.mktemp("faults") / "run"
    text = config_text(run)
    folder.mkdir(exist_ok=True)
    (folder / "config.txt").write_text(text)
    gloo1.run(resave, imported, folder / "checkpoints" / "step_00000005", layout(), text)
    return folder


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(bytes(content))


def place_of(folder: Path, values: torch.Tensor) -> tuple[Path, int]:
    """File and first byte of these values in a checkpoint."""
    needle = values.numpy().tobytes()
    for path in sorted(folder.glob("*.distcp")):
        if (at := path.read_bytes().find(needle)) >= 0:
            return path, at
    raise AssertionError("the values are in no file")


@pytest.mark.parametrize("command", ["megatron-to-hf", "release"])
def test_a_flipped_bit_in_a_weight_is_named(
    command: str, run_dir: Path, full_release: FullRelease, gloo1: Any, tmp_path: Path
) -> None:
    """Its size is right, and every program would read it."""
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    checkpoint = damaged / "checkpoints" / "step_00000005"
    norm = full_release[1].state_dict()["model.norm.weight"]
    flip_a_bit(*place_of(checkpoint, norm))
    code, lines, errors = gloo1.run(run_main, command, damaged, tmp_path / "out")[0]
    assert (code, lines) == (1, [])
    assert errors == (
        f"error: {checkpoint}: final_layernorm.weight is not what was saved; use another checkpoint of the run\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_changed_configuration_is_named(run_dir: Path, gloo1: Any, tmp_path: Path) -> None:
    """Another rope_theta of the same length is another model."""
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    config = damaged / "checkpoints" / "step_00000005" / "config.txt"
    text = config.read_text()
    assert "model.rope_theta: 1" in text
    config.write_text(text.replace("model.rope_theta: 1", "model.rope_theta: 2"))
    code, _, errors = gloo1.run(run_main, "megatron-to-hf", damaged, tmp_path / "out")[0]
    assert code == 1
    assert "config.txt: its bytes are not those that were written" in errors


def test_a_flipped_bit_in_a_converted_checkpoint_is_named(
    imported: Path, full_release: FullRelease, tokenizer_folder: Path, gloo1: Any, tmp_path: Path
) -> None:
    damaged = tmp_path / "imported"
    shutil.copytree(imported, damaged)
    flip_a_bit(*place_of(damaged, full_release[1].state_dict()["model.norm.weight"]))
    options = ("--tokenizer", tokenizer_folder, "--image-edge", 16)
    code, _, errors = gloo1.run(run_main, "megatron-to-hf", damaged, tmp_path / "out", *options)[0]
    assert code == 1
    assert "__0_0.distcp: its bytes are not those that were written" in errors


def canonical_agrees(folder: Path) -> list[str]:
    """In a worker: names of a run's canonical tensors whose hash a converter computes otherwise."""
    tensors, stored = read_megatron(folder).tensors, read_manifest(folder).tensors
    assert len(stored) > 20
    return [n for n, h in stored.items() if canonical_hash(tensors, n, h.shape) != h]


@pytest.mark.parametrize("parallel", [layout(tensor=2), layout(pipeline=2)], ids=["tp2", "pp2"])
def test_a_converter_computes_the_hashes_of_any_layout(
    parallel: Any, imported: Path, gloo1: Any, gloo2: Any, tmp_path: Path
) -> None:
    """Stacks in pieces, gate and up apart, a vocabulary with rows of padding: the same canonical tensors."""
    gloo2.run(resave, imported, tmp_path / "saved", parallel, None)
    assert gloo1.run(canonical_agrees, tmp_path / "saved") == [[]]


@contextlib.contextmanager
def fault(kind: str | None, *, room: int = 30_000) -> Iterator[None]:
    """A disk that takes files up to `room` bytes, that says only at fsync that it is full, or that refuses a new
    folder."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if kind == FULL_DISK:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    patches = {
        NO_PERMISSION: patch.object(Path, "mkdir", _forbidden),
        FULL_AT_SYNC: patch.object(os, "fsync", _full),
    }
    try:
        with patches.get(kind or "", contextlib.nullcontext()):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _forbidden(self: Path, *args: Any, **kwargs: Any) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main_with_fault(kind: str, *arguments: object) -> tuple[int, list[str], str]:
    with fault(kind):
        return run_main(*arguments)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FULL_DISK, "File too large"),
        (FULL_AT_SYNC, "No space left on device"),
        (NO_PERMISSION, "Permission denied"),
    ],
)
@pytest.mark.parametrize("command", ["hf-to-megatron", "megatron-to-hf", "official", "release"])
def test_a_disk_that_refuses_leaves_everything_as_it_was(
    command: str,
    kind: str,
    message: str,
    full_release: FullRelease,
    run_dir: Path,
    gloo1: Any,
    tmp_path: Path,
) -> None:
    """Also the folder that was to be replaced."""
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "precious").write_text("as it was")
    source = full_release[0] if command == "hf-to-megatron" else run_dir
    name, extra = (
        ("megatron-to-hf", ["--layout", "official"]) if command == "official" else (command, [])
    )
    arguments = [name, source, dest, "--overwrite", *extra]
    code, lines, errors = gloo1.run(main_with_fault, kind, *arguments)[0]
    assert (code, lines) == (1, [])
    assert errors.count("\n") == 1, errors
    assert errors.startswith(f"error: {dest}")
    assert message in errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (dest / "precious").read_text() == "as it was"


@pytest.mark.parametrize(
    "arguments",
    [
        ("hf-to-megatron", "run", "run"),
        ("release", "run", "run/../run"),
        ("megatron-to-hf", "run/checkpoints/step_00000005", "run"),
    ],
)
def test_overwrite_does_not_delete_the_source(
    arguments: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000005").mkdir(parents=True)
    command, source, dest = arguments
    assert main([command, str(tmp_path / source), str(tmp_path / dest), "--overwrite"]) == 2
    assert "which would be deleted; choose another name" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step_00000005").is_dir()


def release_while_the_run_goes_on(run_dir: Path, dest: Path) -> tuple[int, str]:
    """In a worker: after the weights are read, the run publishes step 9."""
    read = megatron_to_hf.read_megatron

    def slowly(source: Path) -> Any:
        weights = read(source)
        checkpoints = run_dir / "checkpoints"
        shutil.copytree(checkpoints / "step_00000005", checkpoints / "step_00000009")
        return weights

    with patch.object(megatron_to_hf, "read_megatron", slowly):
        code, _, errors = run_main("release", run_dir, dest, "--skip-check")
    return code, errors


def test_a_release_is_of_one_checkpoint_though_the_run_goes_on(
    run_dir: Path, gloo1: Any, tmp_path: Path
) -> None:
    """The card names the step whose weights are in the folder."""
    going_on = tmp_path / "run"
    shutil.copytree(run_dir, going_on)
    (going_on / "checkpoints" / ".tmp-step_00000008-0").mkdir()  # being written
    assert gloo1.run(release_while_the_run_goes_on, going_on, tmp_path / "out") == [(0, "")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "run, step 5" in card
    assert "step 9" not in card


def convert_inside(run_dir: Path, *arguments: object) -> tuple[int, str]:
    """In a worker."""
    with contextlib.chdir(run_dir):
        code, _, errors = run_main(*arguments)
    return code, errors


@pytest.mark.parametrize(
    ("command", "origin"), [("release", "run, step 5"), ("megatron-to-hf", "run, step_00000005")]
)
def test_the_card_names_a_run_that_is_the_working_directory(
    command: str, origin: str, run_dir: Path, gloo1: Any, tmp_path: Path
) -> None:
    assert gloo1.run(convert_inside, run_dir, command, ".", tmp_path / "out") == [(0, "")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| made from | {origin} |" in card
    assert "\n| run (`eve_tiny_stage3`) |" in card


def sharded(folder: Path, source: Path) -> dict[str, str]:
    """The release's weights in two files with an index; returns its weight_map."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("reader", ["hf-to-megatron", "generate"])
def test_shards_that_contradict_the_index_are_named(
    reader: str,
    full_release: FullRelease,
    tmp_path: Path,
    gloo1: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A shard that is not there, a tensor in two shards, one that the index does not know, an index that is none."""
    folder = tmp_path / "sharded"
    weight_map = sharded(folder, full_release[0])
    first, second = sorted(set(weight_map.values()))
    whole = {path: path.read_bytes() for path in folder.iterdir()}

    def attempt() -> str:
        code, errors = (
            read_with_generate(folder, capsys)
            if reader == "generate"
            else gloo1.run(read_with_converter, folder, tmp_path / "out")[0]
        )
        assert (code, errors.count("\n")) == (1, 1), errors
        assert not (tmp_path / "out").exists()
        for path, content in whole.items():
            path.write_bytes(content)
        return errors

    (folder / second).unlink()
    assert f"{second} cannot be read" in attempt()
    twice = load_file(folder / second)
    name = next(iter(load_file(folder / first)))
    save_file(twice | {name: torch.zeros(1)}, folder / second)
    assert f"{name!r}" in attempt()
    save_file(twice | {"model.extra": torch.zeros(1)}, folder / second)
    assert "'model.extra'" in attempt()
    write_index(folder, weight_map | {"model.extra": second})
    save_file(twice | {"model.extra": torch.zeros(1)}, folder / second)
    assert "model.extra" in attempt()
    write_index(folder, [])
    assert "model.safetensors.index.json" in attempt()
    (folder / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in attempt()
    (folder / first).write_bytes(whole[folder / first][:-4])
    assert first in attempt()
    # Of another save, say; transformers would read it.
    save_file(twice, folder / "model.safetensors")
    assert "holds both model.safetensors and model.safetensors.index.json" in attempt()


def read_with_converter(folder: Path, out: Path) -> tuple[int, str]:
    code, _, errors = run_main("hf-to-megatron", folder, out)
    return code, errors


def read_with_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = generate([str(folder), "--prompt", "Which?", "--device", "cpu", "--max-new-tokens", "1"])
    return code, capsys.readouterr().err
