# SPDX-License-Identifier: Apache-2.0
"""Text for training a tokenizer: the lines of a text file, or EVE/LLaVA conversations as the qwen2 template writes
them, without their image marks. The template's own words are in every training sample and deserve tokens."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.readers import iterate_entries
from megatron_eve.data.conversation import SYSTEM_TEXT
from megatron_eve.data.media_names import IMAGE_MARK
from megatron_eve.errors import ConfigError, DataError


def read_texts(path: Path) -> Iterator[str]:
    """The texts of one file. Raises: ConfigError if there is none; DataError if an entry holds no conversation."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; give a text file or a .json/.jsonl file.")
    if path.suffix not in (".json", ".jsonl"):
        with path.open(encoding="utf-8") as file:
            yield from file
        return
    for entry in iterate_entries(path):
        turns = entry.value.get("conversations") if isinstance(entry.value, dict) else None
        if not isinstance(turns, list):
            raise DataError(
                f"{path}: entry {entry.index} has no `conversations`; expected a sample."
            )
        yield _rendered([str(turn["value"]).replace(IMAGE_MARK, "") for turn in turns])


def _rendered(texts: list[str]) -> str:
    """Questions and answers in turn, as in training but for the stop mark, which is no text."""
    words = [SYSTEM_TEXT]
    for number, text in enumerate(texts):
        words += ["USER:" if number % 2 == 0 else "ASSISTANT:", text]
    return " ".join(words)
