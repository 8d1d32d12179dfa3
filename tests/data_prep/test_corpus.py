# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is trained on."""

import gzip
import json
from pathlib import Path

import pytest

from data_prep.corpus import read_texts
from megatron_eve.data.read.conversation import SYSTEM_TEXT
from megatron_eve.errors import DataError


def test_conversations_are_read_as_the_template_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Why?"), ("gpt", "So.")]
    conversation = [{"from": role, "value": text} for role, text in turns]
    path.write_text(json.dumps([{"id": "a", "conversations": conversation}]))
    assert list(read_texts(path)) == [
        f"{SYSTEM_TEXT} USER: \nWhat? ASSISTANT: A cat. USER: Why? ASSISTANT: So."
    ]


def test_text_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n")
    assert list(read_texts(path)) == ["one\n", "two\n"]


def test_gzip_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert list(read_texts(path)) == ["one\n", "two\n"]


def test_what_is_no_text_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    path.write_bytes(b"PAR1\x15\xff\x00")
    with pytest.raises(DataError, match="is a Parquet file, which is not read"):
        list(read_texts(path))


@pytest.mark.parametrize("turns", [None, "text", ["text"], [{"from": "human", "value": 3}], [{}]])
def test_samples_without_texts_are_refused(tmp_path: Path, turns: object) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(DataError, match="entry 0 has no `conversations` of texts"):
        list(read_texts(path))
