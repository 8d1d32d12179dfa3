# SPDX-License-Identifier: Apache-2.0
"""Which row of the embedding belongs to which token: recorded with weights, compared wherever they meet a tokenizer.

Two tokenizers with the same number of ids look alike to every shape, but weights of one write nonsense with the
other. A run records its whole vocabulary in complete.json; a converter records the language model's without added
tokens, because reserved ones may be renamed (`<|im_end|>` in a Llama). A tokenizer that only adds ids fits."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from megatron_eve.errors import ConfigError

FACT = "vocabulary"
"""Its name among the facts of complete.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The tokens of ids 0 to `num_ids` - 1."""

    num_ids: int
    with_added: bool  # special and other added tokens, too
    hash: str

    def as_json(self) -> dict[str, Any]:
        return {"num_ids": self.num_ids, "with_added": self.with_added, "hash": self.hash}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Vocabulary":
        return cls(
            num_ids=entry["num_ids"], with_added=entry["with_added"], hash=str(entry["hash"])
        )


def vocabulary_of(
    backend: tokenizers.Tokenizer, *, with_added: bool, num_ids: int | None = None
) -> Vocabulary:
    """A tokenizer's vocabulary; with `num_ids`, only that of its first ids."""
    tokens = backend.get_vocab(with_added_tokens=with_added)
    count = max(tokens.values(), default=-1) + 1 if num_ids is None else num_ids
    listed = sorted((number, token) for token, number in tokens.items() if number < count)
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]
    return Vocabulary(num_ids=count, with_added=with_added, hash=digest)


def refuse_other_vocabulary(
    recorded: Mapping[str, Any] | None,
    backend: tokenizers.Tokenizer,
    *,
    folder: str | Path,
    weights: str | Path,
) -> None:
    """`recorded`: with the weights; None in old weights. Raises: ConfigError."""
    if recorded is None:
        return
    expected = Vocabulary.from_json(recorded)
    found = vocabulary_of(backend, with_added=expected.with_added, num_ids=expected.num_ids)
    if found != expected:
        raise ConfigError(
            f"the tokenizer {folder} is not the one of the weights {weights}: its tokens of ids 0 to "
            f"{expected.num_ids - 1} have the hash {found.hash}, theirs {expected.hash}, so rows of the "
            "embedding would stand for other tokens; use the tokenizer that the weights were trained with."
        )


def stored_vocabulary(folder: Path) -> dict[str, Any] | None:
    """The vocabulary of a Hugging Face folder, without added tokens; None without a readable tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception; weights convert without their tokenizer
        return None
    return vocabulary_of(backend, with_added=False).as_json()
