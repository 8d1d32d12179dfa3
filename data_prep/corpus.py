# SPDX-License-Identifier: Apache-2.0
"""Text for training a tokenizer: the lines of a text file, or EVE/LLaVA conversations as the qwen2 template writes
them, without their image marks. The template's own words are in every training sample and deserve tokens."""

from collections.abc import Iterator
from pathlib import Path

from megatron_eve.data.read.conversation import SYSTEM_TEXT
from megatron_eve.data.read.media_names import IMAGE_MARK
from megatron_eve.errors import ConfigError, DataError

from .formats import refusal_of_file
from .readers import iterate_entries, open_text


def read_texts(path: Path) -> Iterator[str]:
    """The texts of one file. Raises: ConfigError if there is none; DataError if an entry holds no conversation."""
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; give a text file or a .json/.jsonl file.")
    if Path(path.name.removesuffix(".gz")).suffix not in (".json", ".jsonl", ".ndjson"):
        try:
            with open_text(path) as file:
                yield from file
        except UnicodeDecodeError as error:
            raise refusal_of_file(path, problem=f"is not UTF-8 text ({error})") from error
        return
    for entry in iterate_entries(path):
        turns = entry.value.get("conversations") if isinstance(entry.value, dict) else None
        values = turns if isinstance(turns, list) else [None]
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in values]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{path}: entry {entry.index} has no `conversations` of texts ({entry.error or 'no sample'}); "
                "expected a sample, see docs/data.md."
            )
        yield _rendered([str(text).replace(IMAGE_MARK, "") for text in texts])


def _rendered(texts: list[str]) -> str:
    """Questions and answers in turn, as in training but without the stop mark, which is no text."""
    words = [SYSTEM_TEXT]
    for number, text in enumerate(texts):
        words += ["USER:" if number % 2 == 0 else "ASSISTANT:", text]
    return " ".join(words)
