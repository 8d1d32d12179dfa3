# SPDX-License-Identifier: Apache-2.0
"""Folders that look like weights or a tokenizer to what reads their small files alone: no tensor, no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.config.model_lines import flat_model
from megatron_eve.config.schema import ModelConfig


def write_model_folder(folder: Path, model: ModelConfig, *, without: str = "") -> Path:
    """A converter's folder with the model's lines but those of field `without`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {k: v for k, v in flat_model(model).items() if k != f"model.{without}"}
    (folder / "config.txt").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    (folder / "complete.json").write_text("{}")
    return folder


def write_word_tokenizer(folder: Path, words: Sequence[str], *, special: Sequence[str]) -> Path:
    """A tokenizer of whole words, then the special tokens; the first special one ends and pads."""
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=words[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": special[0], "pad_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
