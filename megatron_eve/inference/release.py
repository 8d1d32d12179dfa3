# SPDX-License-Identifier: Apache-2.0
"""The facts of a released folder's model: shape, split, image preparation, template, where an answer ends.

Reads its JSON files, never its Python files. Refuses a folder that is no release, whose decoder computes something else
than ours, or whose files contradict each other: transformers would follow one of them, and the engine another.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eve.config.hf_checks import unsupported, with_rope_theta
from megatron_eve.config.hf_fields import HF_EVE_FIELDS, HF_FIELDS
from megatron_eve.config.schema import ModelConfig, TemplateName
from megatron_eve.config.variants import split_from_moe_part
from megatron_eve.data.read.conversation import STOP_TEXT
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.errors import CheckpointError

ResizeRule = Literal["train", "eval"]
RESIZE_RULES: tuple[ResizeRule, ...] = ("train", "eval")

_FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRules:
    """How an image becomes pixels: preprocessor_config.json."""

    edge: int
    """M of the resize rules: the area is capped at (train) or scaled to (eval) M * M pixels."""
    resize_rule: ResizeRule  # the release's own; a request may choose another
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    exif_rotation: bool  # whether the orientation in metadata is obeyed, as in training


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseInfo:
    """A released folder without its weights and its tokenizer."""

    folder: Path
    model: ModelConfig
    images: ImageRules
    template: TemplateName  # of prompts; plain: it was trained on captions alone
    stop_ids: tuple[int, ...]  # tokens that end an answer
    pad_id: int | None
    repetition_penalty: float  # generation_config.json's; 1.0 in our releases


def read_release(folder: Path) -> ReleaseInfo:
    """Raises CheckpointError: a missing file, a missing or mistyped field, a decoder that is not ours."""
    for name in _FILES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is no released folder: {name} not found; make one with "
                "`megatron-eve convert megatron-to-hf`."
            )
    path = folder / "config.json"
    content = _read_json(path)
    if content.get("model_type") != "eve-qwen2":
        raise CheckpointError(
            f"{path}: model_type is {content.get('model_type')!r}, expected 'eve-qwen2'; convert the folder with "
            "`megatron-eve convert`."
        )
    _refuse_other_decoders(content, path)
    _refuse_other_patches(content, folder / "preprocessor_config.json")
    generation = folder / "generation_config.json"
    settings = _read_json(generation) if generation.is_file() else {}
    _refuse_other_ends(content, settings, generation)
    _refuse_other_decoding(settings, generation)
    return ReleaseInfo(
        folder=folder,
        model=_model(content, path),
        images=_image_rules(folder / "preprocessor_config.json"),
        template=_template(folder),
        stop_ids=_stop_ids(settings.get("eos_token_id", content.get("eos_token_id")), generation),
        pad_id=settings.get("pad_token_id", content.get("pad_token_id")),
        repetition_penalty=1.0
        if settings.get("repetition_penalty") is None
        else _field(settings, "repetition_penalty", float, path=generation),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _model(content: dict[str, Any], path: Path) -> ModelConfig:
    flat, fields = with_rope_theta(content), HF_FIELDS | HF_EVE_FIELDS
    values = {field: _field(flat, *entry, path=path) for field, entry in fields.items()}
    is_split = _field(content, "add_moe", bool, path=path)
    part = _field(content, "moe_part", str, path=path) if is_split else None
    return ModelConfig(**values, split=split_from_moe_part(part))


def _image_rules(path: Path) -> ImageRules:
    content = _read_json(path)
    rule = content.get("resize_rule", "train")
    if rule not in RESIZE_RULES:
        raise CheckpointError(f"{path}: resize_rule is {rule!r}, expected 'train' or 'eval'.")
    statistics = []
    for name in ("image_mean", "image_std"):
        values = _field(content, name, list, path=path)
        if len(values) != 3:
            raise CheckpointError(f"{path}: {name} is {values}, expected three numbers.")
        statistics.append((float(values[0]), float(values[1]), float(values[2])))
    return ImageRules(
        edge=_field(content, "max_size", int, path=path),
        resize_rule=rule,
        mean=statistics[0],
        std=statistics[1],
        # older releases turned every picture
        exif_rotation=_field({"exif_rotation": True} | content, "exif_rotation", bool, path=path),
    )


def _refuse_other_patches(content: dict[str, Any], path: Path) -> None:
    """transformers' processor reads the geometry there, the model in config.json."""
    processor = _read_json(path)
    for name in ("patch_stride", "dense_stride"):
        if processor.get(name, content.get(name)) != content.get(name):
            raise CheckpointError(
                f"{path}: {name} is {processor[name]!r}, but config.json says {content.get(name)!r}; make the release "
                "again with `megatron-eve convert megatron-to-hf`."
            )


def _field(content: dict[str, Any], name: str, kind: type, *, path: Path) -> Any:
    value = content.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"{path}: {name} is {value!r}, expected a {kind.__name__}; make the release again with "
            "`megatron-eve convert megatron-to-hf`."
        )
    return value


def check_tokenizer(info: ReleaseInfo, tokenizer: Tokenizer) -> None:
    """Raises: CheckpointError for a tokenizer that has ids without a row, whose end of an answer ends none here, or
    that pads with another token than the model."""
    folder, model = info.folder, info.model
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {model.vocab_size} rows; put "
            "the tokenizer there that the model was trained with."
        )
    ends = {"eos_token of tokenizer_config.json": tokenizer.eos_id}
    if info.template == "qwen2":
        ends[f"{STOP_TEXT}, which the chat template writes,"] = tokenizer.token_id(STOP_TEXT)
    for name, number in ends.items():
        if number not in info.stop_ids:
            raise CheckpointError(
                f"{folder}: {name} is {number}, but an answer ends at {list(info.stop_ids)} (eos_token_id of "
                "generation_config.json, else of config.json); make the release again, or name it there."
            )
    if info.pad_id not in (None, tokenizer.pad_id):
        raise CheckpointError(
            f"{folder}: pad_token_id is {info.pad_id}, pad_token of tokenizer_config.json {tokenizer.pad_id}; make the "
            "release again with `megatron-eve convert megatron-to-hf`."
        )


def _template(folder: Path) -> TemplateName:
    """Releases of conversations have a chat template; transformers may have saved it to a file of its own."""
    files = ("chat_template.jinja", "chat_template.json")
    found = _read_json(folder / "tokenizer_config.json").get("chat_template")
    return "qwen2" if found or any((folder / name).is_file() for name in files) else "plain"


def _refuse_other_ends(content: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """generation_config.json and config.json must agree: a reader of the second alone must not answer on and on."""
    if settings.get("eos_token_id") is not None and content.get("eos_token_id") is not None:
        ends = _stop_ids(settings["eos_token_id"], path)
        others = _stop_ids(content["eos_token_id"], path.with_name("config.json"))
        if not set(others) <= set(ends):
            raise CheckpointError(
                f"{path}: eos_token_id is {list(ends)}, in config.json {list(others)}; make the release again with "
                "`megatron-eve convert megatron-to-hf`."
            )
    pads = {c["pad_token_id"] for c in (content, settings) if c.get("pad_token_id") is not None}
    if len(pads) > 1:
        raise CheckpointError(
            f"{path}: pad_token_id is {settings['pad_token_id']}, in config.json {content['pad_token_id']}; keep one."
        )


_GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "min_length": 0, "min_new_tokens": 0,
    "diversity_penalty": 0.0, "guidance_scale": 1.0, "bad_words_ids": [], "suppress_tokens": [],
    "begin_suppress_tokens": [], "sequence_bias": {}, "forced_bos_token_id": [], "forced_eos_token_id": [],
    "stop_strings": [],
}  # fmt: skip
"""Settings of generation_config.json that choose other tokens, and the value with which they do not."""


def _refuse_other_decoding(settings: dict[str, Any], path: Path) -> None:
    """Refuse decoding that transformers would do by default and the engine does not."""
    for name, neutral in _GREEDY.items():
        if settings.get(name) not in (None, neutral):
            raise CheckpointError(
                f"{path}: {name} is {settings[name]!r}; by default the engine decodes greedily, with a repetition "
                "penalty at most. Take it out, and ask for it where you ask."
            )


def _stop_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected a token id or a list.")
    return tuple(ids)


def _refuse_other_decoders(content: dict[str, Any], path: Path) -> None:
    problems = list(unsupported(content))
    if problems:
        raise CheckpointError("\n".join(f"{path}: {problem}" for problem in problems))
