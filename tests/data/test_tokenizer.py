# SPDX-License-Identifier: Apache-2.0
"""The Qwen2.5 tokenizer gives the published ids; every broken folder is named."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_eve.data.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.errors import ConfigError


def test_published_ids(qwen: Tokenizer) -> None:
    assert qwen.vocab_size == 151665
    assert (qwen.eos_id, qwen.pad_id) == (151645, 151643)
    assert qwen.encode("Hello, how are you?") == [9707, 11, 1246, 525, 498, 30]
    assert qwen.encode(" Hello world") == [21927, 1879]
    assert "<|im_end|>" in qwen.special_tokens
    assert "<tool_call>" not in qwen.special_tokens


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
