# SPDX-License-Identifier: Apache-2.0
"""What a run is told twice is compared before anything is built, in a dry run too."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.data.read.vocabulary import FACT, vocabulary_of
from megatron_eve.train import main
from tests.support.weights_text import write_model_folder, write_word_tokenizer

STOP = "<|im_end|>"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """16 ids."""
    words = [f"w{number}" for number in range(15)]
    return write_word_tokenizer(tmp_path / "tokenizer", words, special=[STOP])


@pytest.fixture
def model() -> ModelConfig:
    return replace(load_recipe("eve_tiny_stage3").model, vocab_size=16)


@pytest.fixture
def arguments(tmp_path: Path, tokenizer: Path, model: ModelConfig) -> list[str]:
    weights = write_model_folder(tmp_path / "weights", model)
    return [
        "eve_tiny_stage3",
        f"run_dir={tmp_path / 'run'}",
        f"checkpoint.load_weights_from={weights}",
        f"data.tokenizer={tokenizer}",
        "model.vocab_size=16",
    ]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_other_constants_than_the_weights_have_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    assert main([*arguments, "model.rope_theta=20000", "model.rms_norm_eps=1e-5", *dry]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.count("but the weights of") for line in lines] == [1, 1]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_shards_whose_pictures_were_measured_in_another_way_are_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "dataset.json").write_text('{"options": {"exif_rotation": false}}')
    arguments.append(f"data.sources.0.path={shards}")
    assert main([*arguments, *dry]) == 2
    assert "data.exif_rotation=true, but" in capsys.readouterr().err
    assert main([*arguments, "data.exif_rotation=false", "--dry-run"]) == 0


def test_the_resolved_configuration_says_what_was_taken(
    arguments: list[str], tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_folder(tmp_path / "weights", replace(model, rope_theta=12345.0, num_layers=6))
    assert main([*arguments, "--dry-run"]) == 2
    assert main([*arguments, "model=from_weights", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "model.rope_theta: 12345.0\n" in text
    assert "model.num_layers: 6\n" in text


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_id_without_a_row_is_refused(
    arguments: list[str],
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    tensor: int,
    dry: list[str],
) -> None:
    """17 ids: with 4 ranks the table has 20 rows, of which the last 4 only pad it."""
    words = [f"w{number}" for number in range(15)]
    write_word_tokenizer(tokenizer, words, special=[STOP, "<|last|>"])
    layout = [f"parallel.tensor={tensor}", f"parallel.gpus_per_node={tensor}"]
    layout += ["model.num_kv_heads=4", "checkpoint.load_weights_from=none"]
    assert main([*arguments, *layout, *dry]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "has ids up to 16 ('<|last|>'), but model.vocab_size=16 has rows for 0 to 15" in line
    assert "special ones among them: <|last|> (16)" in line


def test_a_table_that_holds_every_id_is_enough(arguments: list[str]) -> None:
    assert main([*arguments, "--dry-run"]) == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_tokenizer_without_the_stop_token_is_refused(
    arguments: list[str], tokenizer: Path, capsys: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    write_word_tokenizer(tokenizer, ["a", "b"], special=["<end>"])
    assert main([*arguments, *dry]) == 2
    assert f"no token '{STOP}'" in capsys.readouterr().err


def test_a_dry_run_says_what_is_not_there_to_be_compared(
    arguments: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent = [
        f"checkpoint.load_weights_from={tmp_path / 'no'}",
        f"data.tokenizer={tmp_path / 'no'}",
    ]
    assert main([*arguments, *absent, "--dry-run"]) == 0
    assert [message.split(":")[-1] for message in caplog.messages] == [
        " its model is not compared with this one",
        " its ids are not compared with model.vocab_size",
    ]


def test_weights_that_are_not_there_end_a_run_before_it_begins(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"checkpoint.load_weights_from={tmp_path / 'no'}"]) == 1
    assert f"error: no checkpoint folder {tmp_path / 'no'}" in capsys.readouterr().err


def test_a_dry_run_of_another_model_in_a_run_directory_is_refused(
    arguments: list[str], tmp_path: Path, model: ModelConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints are what it would resume from, whatever the weights say that it started with."""
    assert main([*arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out.split("\n\n")[0]
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "run" / "config.txt").write_text(text)
    write_model_folder(tmp_path / "weights", replace(model, rope_theta=1.0))
    assert main([*arguments, "--dry-run"]) == 0
    assert main([*arguments, "model.rope_theta=20000", "--dry-run"]) == 2
    assert "model.rope_theta was 1000000.0, is 20000.0" in capsys.readouterr().err


def test_nothing_is_compared_with_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from megatron_eve.train import main; "
        f"code = main({[*arguments, '--dry-run']!r}); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def record(weights: Path, tokenizer: Path, *, with_added: bool) -> None:
    """As a run or a converter does, into complete.json."""
    backend = load_tokenizer(tokenizer).backend
    fact = vocabulary_of(backend, with_added=with_added).as_json()
    (weights / "complete.json").write_text(json.dumps({FACT: fact}))


@pytest.mark.parametrize("with_added", [True, False])
def test_a_tokenizer_with_other_tokens_in_its_rows_is_refused(
    arguments: list[str],
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
    with_added: bool,
) -> None:
    """As many ids, the special token where it was: nothing but the words tell."""
    record(tmp_path / "weights", tokenizer, with_added=with_added)
    assert main([*arguments, "--dry-run"]) == 0
    words = [f"w{number}" for number in range(15)]
    write_word_tokenizer(tokenizer, [*words[:8], words[9], words[8], *words[10:]], special=[STOP])
    assert main([*arguments, "--dry-run"]) == 2
    assert "is not the one of the weights" in capsys.readouterr().err


def test_tokens_that_are_added_behind_the_weights_own_fit(
    arguments: list[str], tmp_path: Path, tokenizer: Path
) -> None:
    record(tmp_path / "weights", tokenizer, with_added=True)
    words = [f"w{number}" for number in range(15)]
    write_word_tokenizer(tokenizer, words, special=[STOP, "<|more|>"])
    weights = write_model_folder(
        tmp_path / "more", replace(load_recipe("eve_tiny_stage3").model, vocab_size=17)
    )
    (weights / "complete.json").write_text((tmp_path / "weights/complete.json").read_text())
    bigger = [f"checkpoint.load_weights_from={weights}", "model.vocab_size=17"]
    assert main([*arguments, *bigger, "--dry-run"]) == 0


def test_a_language_models_reserved_token_may_get_a_name(
    arguments: list[str], tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A converter records the words alone; a run knows what its special tokens mean."""
    words = [f"w{number}" for number in range(15)]
    before = write_word_tokenizer(tmp_path / "llama", words, special=["<|reserved|>"])
    record(tmp_path / "weights", before, with_added=False)
    assert main([*arguments, "--dry-run"]) == 0
    record(tmp_path / "weights", before, with_added=True)
    assert main([*arguments, "--dry-run"]) == 2
    assert "is not the one of the weights" in capsys.readouterr().err
