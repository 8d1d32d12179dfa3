# SPDX-License-Identifier: Apache-2.0
"""A complete Hugging Face folder: weights, configuration, tokenizer, our modelling files, model card.

Nothing in it points outside: it loads offline with `AutoModelForCausalLM`, `AutoProcessor` and `AutoTokenizer`,
`trust_remote_code=True`.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.data.read.conversation import STOP_TEXT
from megatron_eve.data.read.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.errors import CheckpointError
from megatron_eve.inference.release import check_tokenizer, read_release

from .generation import (
    GENERATION_FILE,
    answer_ends,
    generation_json,
    not_applied,
)
from .hf_config import model_json, preprocessor_json
from .hf_folder import MAX_SHARD_BYTES, write_safetensors
from .model_card import CardAdditions, CardFacts, last_template, model_card
from .new_folder import new_folder
from .run_record import History

CODE_FILES = (
    "attention_eve.py",
    "batch_eve.py",
    "chat_eve.py",
    "configuration_eve.py",
    "modality_eve.py",
    "modeling_eve.py",
    "pixels_eve.py",
    "places_eve.py",
    "processing_eve.py",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """The contents of a released folder, apart from the weights."""

    model: ModelConfig
    dtype: Literal["bfloat16", "float32"]
    tokenizer: Path
    image_edge: int  # M of the resize rules (train time)
    run: RunConfig | None  # the run that trained the weights, if the checkpoint knows it
    origin: str  # one line for the model card: which checkpoint, which step
    history: History | None = None  # the runs behind it; None: a converter wrote the checkpoint
    exif_rotation: bool = True  # whether pictures are turned as their metadata says, as in training
    source_generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json of the model that the training started with."""
    additions: CardAdditions = field(default_factory=CardAdditions)


def write_release(
    folder: Path,
    release: Release,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> int:
    """Write the folder; returns the bytes of the weights. `finish` gets it before it has its name. Raises:
    CheckpointError if it exists and not `overwrite`."""
    tokenizer = fitting_tokenizer(release.tokenizer, release.model, run=release.run)
    with new_folder(folder, overwrite=overwrite) as partial:
        total = write_safetensors(partial, tensors, max_shard_bytes=max_shard_bytes)
        for name, content in _json_files(release, tokenizer).items():
            write_json(partial / name, content)
        copy_tokenizer(release.tokenizer, partial, release)
        for path in partial.glob("*.safetensors"):  # safetensors writes for the owner alone
            path.chmod((partial / "config.json").stat().st_mode)
        code = resources.files(f"{__package__}.hf")
        for name in CODE_FILES:
            (partial / name).write_text(code.joinpath(name).read_text(encoding="utf-8"))
        check_tokenizer(read_release(partial), load_tokenizer(partial))
        card = model_card(_facts(release, tokenizer))
        (partial / "README.md").write_text(card, encoding="utf-8")
        if finish is not None:
            finish(partial)
    return total


def _json_files(release: Release, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """JSON files by name."""
    return {
        "config.json": config_json(release, tokenizer),
        GENERATION_FILE: generation_json(tokenizer, release.source_generation),
        "preprocessor_config.json": preprocessor_json(
            release.model, image_edge=release.image_edge, exif_rotation=release.exif_rotation
        ),
    }


def config_json(release: Release, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json; its ends are those of generation_config.json."""
    return model_json(
        release.model,
        dtype=release.dtype,
        eos_id=list(answer_ends(tokenizer, release.source_generation)),
        pad_id=tokenizer.pad_id,
        image_edge=release.image_edge,
        run=release.run,
    )


def _facts(release: Release, tokenizer: Tokenizer) -> CardFacts:
    return CardFacts(
        model=release.model,
        dtype=release.dtype,
        image_edge=release.image_edge,
        origin=release.origin,
        template=last_template(release.run),
        history=release.history,
        additions=release.additions,
        not_applied=tuple(not_applied(release.source_generation, tokenizer)),
    )


def fitting_tokenizer(folder: Path, model: ModelConfig, *, run: RunConfig | None) -> Tokenizer:
    """Raises: CheckpointError if it has ids without a row in the model, or lacks the token that ends an answer of the
    run's conversations; ConfigError if there is none."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"The tokenizer {folder} has ids up to {tokenizer.vocab_size - 1}, the model {model.vocab_size} rows; give "
            "the tokenizer that the model was trained with (--tokenizer)."
        )
    if last_template(run) == "qwen2" and STOP_TEXT not in tokenizer.special_tokens:
        raise CheckpointError(
            f"The tokenizer {folder} has no special token {STOP_TEXT}, with which a conversation ends an answer; give "
            "the tokenizer that the model was trained with (--tokenizer)."
        )
    return tokenizer


def chat_template_of(run: RunConfig | None) -> str | None:
    """The template of `apply_chat_template`: the conversation that the model was trained on; None after captions."""
    if last_template(run) == "plain":
        return None
    file = resources.files(f"{__package__}.hf").joinpath("chat_template.jinja")
    return file.read_text(encoding="utf-8")


def copy_tokenizer(source: Path, dest: Path, release: Release) -> None:
    """The tokenizer's files. tokenizer.json gets its merges in the form that every version of `tokenizers` reads;
    tokenizer_config.json the chat template for the language model's own, which this model never saw, the number of
    positions that this model has, and padding on the side for `generate`."""
    chat_template = chat_template_of(release.run)
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        if name == "tokenizer.json":
            text = (source / name).read_text(encoding="utf-8")
            (dest / name).write_text(portable_tokenizer(text), encoding="utf-8")
        elif name == "tokenizer_config.json":
            config = json.loads((source / name).read_text(encoding="utf-8"))
            config.pop("chat_template", None)
            config |= {} if chat_template is None else {"chat_template": chat_template}
            config["model_max_length"] = release.model.max_position_embeddings
            config["padding_side"] = "left"
            write_json(dest / name, config)
        else:
            shutil.copyfile(source / name, dest / name)


def portable_tokenizer(text: str) -> str:
    """tokenizer.json with BPE merges as "a b" instead of ["a", "b"].

    `tokenizers` 0.20 and later write pairs, which 0.19 does not read, and transformers 4.44 (the official EVEv2's)
    comes with 0.19. Both read "a b". Where a token holds a space itself, only pairs can say it: nothing changes."""
    content = json.loads(text)
    merges = content.get("model", {}).get("merges")
    is_pairs = bool(merges) and isinstance(merges[0], list)
    if not is_pairs or any(" " in token for pair in merges for token in pair):
        return text
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    return json.dumps(content, indent=2, ensure_ascii=False)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes its files: two spaces, sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
