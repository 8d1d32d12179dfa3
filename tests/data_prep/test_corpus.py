# SPDX-License-Identifier: Apache-2.0
"""What a tokenizer is trained on."""

import json
from pathlib import Path

from data_prep.corpus import read_texts
from megatron_eve.data.conversation import SYSTEM_TEXT


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
