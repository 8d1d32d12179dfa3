# SPDX-License-Identifier: Apache-2.0
"""The command line: help with examples, exit codes, last lines."""

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main
from tests.data_prep.pictures import sample, write_dataset

COMMANDS = (
    ["tokenizer", "qwen2.5"],
    ["tokenizer", "train"],
    ["build-shards"],
    ["count"],
    ["verify"],
    ["inspect"],
    ["demo", "easy-vqa"],
    ["demo", "photos"],
    ["demo", "smollm2"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert f"example: python -m data_prep {' '.join(command)} " in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("arguments", [[], ["absent"], ["tokenizer"], ["verify"], ["demo", "x"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_taken_folder_is_2_and_bad_data_are_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "input", num_samples=3)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert main(["build-shards", str(data), str(data.parent), str(tmp_path / "taken")]) == 2
    data.write_text("{}")
    assert main(["build-shards", str(data), str(data.parent), str(tmp_path / "new")]) == 1
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert "is one JSON object, which is not read" in errors


@pytest.mark.parametrize("option", [["--template", "plain"], ["--max-text-tokens", "2048"]])
def test_how_to_count_is_refused_where_nothing_is_counted(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build-shards", str(tmp_path / "data.json"), str(tmp_path), str(tmp_path / "out")]
    assert main([*arguments, *option]) == 2
    assert f"{' '.join(option)} says how tokens are counted" in capsys.readouterr().err


def test_a_fault_of_the_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "b.txt").write_text("a blue circle\n")
    arguments = ["tokenizer", "train", str(tmp_path / "b.txt"), str(tmp_path / "file/out")]
    assert main([*arguments, "--vocab-size", "300"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_build_reports_parts_on_stderr_and_the_result_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "input", num_samples=6)
    out = tmp_path / "out"
    arguments = ["build-shards", str(data), str(data.parent), str(out), "--workers", "1"]
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"dry run: nothing was written to {out}"
    assert main([*arguments, "--samples-per-part", "4", "--source", "mine"]) == 0
    captured = capsys.readouterr()
    assert "part-00001 done (2/2) | samples 6/6 | quarantined 1" in captured.err
    assert captured.out.splitlines()[-1].startswith("wrote 2 shards in 2 parts")
    options = json.loads((out / "dataset.json").read_text())["options"]
    assert (options["source"], options["exif_rotation"]) == ("mine", True)


def test_training_a_tokenizer_on_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps([sample("s", "a.jpg")] * 5))
    (tmp_path / "b.txt").write_text("a blue circle\n" * 5)
    arguments = ["tokenizer", "train", str(tmp_path / "a.json"), str(tmp_path / "b.txt")]
    assert main([*arguments, str(tmp_path / "out"), "--vocab-size", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "of 1,000 tokens asked for" in lines[0]
    assert lines[-1].endswith(f"to {tmp_path / 'out'}")
    vocab = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġblue" in vocab
    assert "image" not in "".join(vocab)
    (tmp_path / "c.json").write_text("[{}]")
    assert main(["tokenizer", "train", str(tmp_path / "c.json"), str(tmp_path / "x"),
                 "--vocab-size", "300"]) == 1  # fmt: skip
