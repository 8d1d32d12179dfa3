# SPDX-License-Identifier: Apache-2.0
"""generation_config.json of a release: where an answer ends, and what is kept of the source's settings.

An answer ends as in training (<|im_end|>), with the tokenizer's own end, with <|endoftext|>, and with every other
special token that the source's generation_config.json names: official checkpoints have both of Qwen2.5's. The ids are
the tokenizer's own. Decoding is greedy without a penalty, whatever the source's defaults; the import and the model card
name those that are not applied.

A conversion records the source's settings in its config.txt, as lines `generation.NAME: JSON`; a release finds them
through the runs that trained the weights since (`checkpoint.load_weights_from`). Refused: a file that is no JSON
object, ends that are no ids.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.checkpoint.weights import read_config_text, weights_folder
from megatron_eve.config.text_form import lines_of
from megatron_eve.data.read.text_rules import END_TEXTS
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.errors import CheckpointError

from .hf_processor import read_object

GENERATION_FILE = "generation_config.json"
OURS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 128, "repetition_penalty": 1.0}
_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
_NO_SETTINGS = ("transformers_version", "_from_model_config")
_PREFIX = "generation."


def read_generation(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder's generation_config.json, its ends completed by those of config.json; {} without either."""
    content = _read(folder / GENERATION_FILE)
    config = _read(folder / "config.json")
    ends = [*_ends(content, folder / GENERATION_FILE), *_ends(config, folder / "config.json")]
    settings = {k: v for k, v in content.items() if k not in _NO_SETTINGS and v is not None}
    if ends:
        settings["eos_token_id"] = list(dict.fromkeys(ends))
    bos = content.get("bos_token_id", config.get("bos_token_id"))
    return settings if bos is None else settings | {"bos_token_id": bos}


def generation_lines(settings: Mapping[str, Any]) -> dict[str, str]:
    """Key -> value, for config.txt."""
    return {f"{_PREFIX}{name}": json.dumps(value) for name, value in settings.items()}


def source_generation(checkpoint: Path) -> dict[str, Any]:
    """Settings that the conversion behind a checkpoint recorded; {} if there was none, or its folder is gone."""
    followed: set[Path] = set()
    while checkpoint.resolve() not in followed:
        followed.add(checkpoint.resolve())
        try:
            text = read_config_text(weights_folder(checkpoint))
        except (CheckpointError, OSError):
            return {}
        lines = lines_of(text)
        found = {k.removeprefix(_PREFIX): v for k, v in lines.items() if k.startswith(_PREFIX)}
        before = lines.get("checkpoint.load_weights_from", "none")
        if found or before == "none":
            return {name: json.loads(value) for name, value in found.items()}
        checkpoint = Path(before)
    return {}


def answer_ends(tokenizer: Tokenizer, source: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer, the one of training first."""
    of_training, *others = (tokenizer.backend.token_to_id(text) for text in END_TEXTS)
    own = [of_training, tokenizer.eos_id, *others]
    kept = [i for i in source.get("eos_token_id", []) if _is_special(i, tokenizer)]
    return tuple(dict.fromkeys(i for i in [*own, *kept] if i is not None))


def generation_json(tokenizer: Tokenizer, source: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy, no repetition penalty. (A Qwen2.5 chat model's file would bring 1.05 and sampling.)"""
    content = {
        **OURS,
        "eos_token_id": list(answer_ends(tokenizer, source)),
        "pad_token_id": tokenizer.pad_id,
    }
    bos = source.get("bos_token_id")
    if isinstance(bos, int) and _is_special(bos, tokenizer):
        content["bos_token_id"] = bos
    return content


def not_applied(source: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> list[str]:
    """`name value` of the source's settings that a release does not follow; with a tokenizer, ends it lacks, too."""
    told = [
        f"{name} {json.dumps(value)}"
        for name, value in sorted(source.items())
        if name not in _IDS and value != OURS.get(name)
    ]
    if tokenizer is not None:
        lost = [i for i in source.get("eos_token_id", []) if not _is_special(i, tokenizer)]
        told += [f"end {number} (no special token of this tokenizer)" for number in lost]
    return told


def _is_special(number: int, tokenizer: Tokenizer) -> bool:
    """In another tokenizer the same number may be any word."""
    return tokenizer.backend.id_to_token(number) in tokenizer.special_tokens


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _ends(content: Mapping[str, Any], path: Path) -> Sequence[int]:
    value = content.get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected a token id or a list.")
    return found
