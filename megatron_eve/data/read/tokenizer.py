# SPDX-License-Identifier: Apache-2.0
"""The text tokenizer: a HF `tokenizer.json` read by the `tokenizers` library, with the ids that
training needs.

Comes in: a folder with tokenizer.json and tokenizer_config.json (eos_token, pad_token), as HF
releases hold it and as `megatron-eve data tokenizer` writes it. No transformers import: it costs
seconds and would tie the data path to it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from megatron_eve.data.read.text_rules import END_TEXTS
from megatron_eve.errors import ConfigError

STOP_TEXT = "<|im_end|>"
"""The token that ends an answer; every tokenizer of a training run must have it."""

_FEW_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Byte-level BPE with named special tokens. Safe to use from several threads."""

    backend: tokenizers.Tokenizer
    folder: str
    eos_id: int
    pad_id: int
    vocab_size: int  # highest id + 1, added tokens included
    special_tokens: tuple[str, ...]  # text of every token marked as special
    end_texts: tuple[str, ...]  # tokens that end or pad a text; no text of a sample may spell them
    fingerprint: str  # changes when any text could be tokenised differently

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added. A special token's literal text becomes that
        token."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; many texts go through all cores, a few through this one (threads cost more)."""
        if len(texts) <= _FEW_TEXTS:
            return [self.encode(text) for text in texts]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, text: str) -> int:
        """Id of a token that the tokenizer must have. Raises ConfigError if it has not."""
        token: int | None = self.backend.token_to_id(text)
        if token is None:
            raise ConfigError(
                f"data.tokenizer={self.folder}: no token {text!r}, which the conversation template needs; "
                "use the Qwen2.5 tokenizer or one made by `megatron-eve data tokenizer`."
            )
        return token


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder. Raises ConfigError if a file, an end or a padding token is
    missing."""
    path = Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            raise ConfigError(
                f"data.tokenizer={path}: {name} not found; give a folder with tokenizer.json and "
                "tokenizer_config.json, or make one with `megatron-eve data tokenizer`."
            )
    content = (path / "tokenizer.json").read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise ConfigError(
            f"data.tokenizer={path}: not a readable HF tokenizer ({error}); make it again."
        ) from error
    backend.no_padding()
    backend.no_truncation()
    ids = {
        key: _configured_id(settings, key, backend=backend, path=path)
        for key in ("eos_token", "pad_token")
    }
    own_ends = (backend.id_to_token(ids["eos_token"]), backend.id_to_token(ids["pad_token"]))
    added = backend.get_added_tokens_decoder()
    digest = hashlib.sha256(content + repr(sorted(ids.items())).encode()).hexdigest()
    return Tokenizer(
        backend=backend,
        folder=str(path),
        eos_id=ids["eos_token"],
        pad_id=ids["pad_token"],
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        special_tokens=tuple(token.content for _, token in sorted(added.items()) if token.special),
        end_texts=tuple(dict.fromkeys((*END_TEXTS, *own_ends))),
        fingerprint=digest[:16],
    )


def refuse_ids_beyond(tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Every id must have a row of the embedding and output layer before these are padded to the tensor-parallel size:
    padding rows are zeros, train nothing, and are cut at export.

    Raises: ConfigError naming the highest token and each special one that has no row."""
    if tokenizer.vocab_size <= vocab_size:
        return
    highest = tokenizer.vocab_size - 1
    special = [
        f"{text} ({number})"
        for text in tokenizer.special_tokens
        if (number := tokenizer.backend.token_to_id(text)) is not None and number >= vocab_size
    ]
    named = f", special ones among them: {', '.join(special[:8])}" if special else ""
    raise ConfigError(
        f"data.tokenizer={tokenizer.folder} has ids up to {highest} ({tokenizer.backend.id_to_token(highest)!r}), but "
        f"model.vocab_size={vocab_size} has rows for 0 to {vocab_size - 1} only{named}; use the tokenizer that the "
        f"weights were trained with, or a model.vocab_size of at least {tokenizer.vocab_size} (existing weights: "
        f"`hf-to-megatron --vocab-size {tokenizer.vocab_size}`)."
    )


def _configured_id(
    settings: dict[str, object], key: str, *, backend: tokenizers.Tokenizer, path: Path
) -> int:
    """Id of the token that tokenizer_config.json names under `key`; HF writes it as text or as
    {"content": text}."""
    value = settings.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    token: int | None = backend.token_to_id(text) if isinstance(text, str) else None
    if token is None:
        raise ConfigError(
            f"data.tokenizer={path}: {key} is {text!r} in tokenizer_config.json, which is no token of "
            "tokenizer.json; name one that exists (Qwen2.5: eos_token <|im_end|>, pad_token <|endoftext|>)."
        )
    return token
