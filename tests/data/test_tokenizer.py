# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5 tokenizer gives the published ids; every broken folder is named."""

import json
import shutil
from pathlib import Path

import pytest

from data_prep.tokenizer import train_bpe
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.data.sample import Turn
from megatron_eve.errors import ConfigError


def test_published_ids(qwen: Tokenizer) -> None:
    assert qwen.vocab_size == 151665
    assert (qwen.eos_id, qwen.pad_id) == (151645, 151643)
    assert qwen.encode("Hello, how are you?") == [9707, 11, 1246, 525, 498, 30]
    assert qwen.encode(" Hello world") == [21927, 1879]
    assert "<|im_end|>" in qwen.special_tokens
    assert "<tool_call>" not in qwen.special_tokens
    assert qwen.end_texts == ("<|im_end|>", "<|endoftext|>")


def test_round_trip_and_batch_equal_single(qwen: Tokenizer) -> None:
    texts = ["", "naïve 你好\n\n  x", "3.14 = π<|im_end|>"]
    for count in (1, 50):  # one by one, and through all cores
        assert qwen.encode_many(texts * count) == [qwen.encode(text) for text in texts] * count
    assert [qwen.decode(qwen.encode(text)) for text in texts] == texts
    assert qwen.decode(qwen.encode(texts[2]), skip_special=True) == "3.14 = π"


def test_missing_token_is_named(qwen: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no token '<no such token>'"):
        qwen.token_id("<no such token>")


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    for name in {"tokenizer.json", "tokenizer_config.json"} - {missing}:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"{missing} not found"):
        load_tokenizer(tmp_path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable HF tokenizer"):
        load_tokenizer(tmp_path)


def test_eos_decides_the_fingerprint_and_must_exist(tmp_path: Path, qwen: Tokenizer) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(qwen.folder, folder)
    assert load_tokenizer(folder).fingerprint == qwen.fingerprint
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "eos_token": {"content": "<|endoftext|>"}}))
    changed = load_tokenizer(folder)
    assert changed.eos_id == 151643
    assert changed.fingerprint != qwen.fingerprint
    path.write_text(json.dumps({**settings, "pad_token": "<nothing>"}))
    with pytest.raises(ConfigError, match="pad_token is '<nothing>'"):
        load_tokenizer(folder)


def test_reserved_tokens_of_another_tokenizer_can_take_the_jobs(tmp_path: Path) -> None:
    """docs/conversion.md on Llama-3's: refused as it is, and what it needs is two names in two files."""
    train_bpe(["What is it? It is a circle."] * 3, tmp_path / "llama-3", 280)
    names = {
        "<|im_end|>": "<|reserved_special_token_0|>",
        "<|im_start|>": "<|reserved_special_token_1|>",
    }
    table, settings = (tmp_path / "llama-3" / f"tokenizer{end}.json" for end in ("", "_config"))
    for path in (table, settings):
        for ours, theirs in names.items():
            path.write_text(path.read_text().replace(ours, theirs))
    theirs_only = {"eos_token": "<|endoftext|>", "pad_token": None}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | theirs_only))
    with pytest.raises(ConfigError, match=r"pad_token is None in tokenizer_config\.json"):
        load_tokenizer(tmp_path / "llama-3")
    pad = names["<|im_start|>"]
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": pad}))
    turns = [Turn("human", "What is it?"), Turn("gpt", "It is a circle.")]
    options = {"num_images": 0, "template": "qwen2", "max_text_tokens": 300}
    with pytest.raises(
        ConfigError, match=r"no token '<\|im_end\|>', which the conversation template"
    ):
        encode_sample(turns, tokenizer=load_tokenizer(tmp_path / "llama-3"), **options)

    table.write_text(table.read_text().replace(names["<|im_end|>"], "<|im_end|>"))
    stop = {"eos_token": "<|im_end|>"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | stop))
    found = load_tokenizer(tmp_path / "llama-3")
    assert found.decode([found.eos_id, found.pad_id]) == f"<|im_end|>{pad}"
    sample = encode_sample(turns, tokenizer=found, **options)
    assert (sample.ids[-1], sample.labels[-1]) == (found.eos_id, found.eos_id)
