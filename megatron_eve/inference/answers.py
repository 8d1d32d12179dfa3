# SPDX-License-Identifier: Apache-2.0
"""Answers of a released model to many questions about images, in batches, greedily.

Works on a released Hugging Face folder through transformers alone. Shared work is done once: an image is prepared once
for all questions about it, and the text that all prompts begin with runs through the model once and its keys and values
are shared (exact up to rounding: attention is causal). Questions are sorted by length, so that little is padded.
Refuses a folder that is no release, and images that cannot be read.

Why not the engine (engine.py): this way an evaluation scores the folder as people load it, with its own modelling and
processing files, and no mistake of the engine can change a release's figures; and the engine shares no beginnings
between prompts, which with short questions are most of the work. A test compares the two:
tests/inference/test_engine.py::test_transformers_answers_the_same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import CheckpointError, ConfigError, DataError
from megatron_eve.inference.release import check_tokenizer, read_release

ResizeRule = Literal["train", "eval"]
_RELEASE_FILES = ("config.json", "preprocessor_config.json", "modeling_eve.py", "tokenizer.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One prompt: a question about images (none, one or several). Template `plain` needs an empty text."""

    text: str
    images: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedModel:
    """A released folder in memory."""

    model: Any  # EVEQwen2ForCausalLM, defined by the folder's own code
    processor: Any  # EVEProcessor


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerOptions:
    """How to put and answer questions."""

    template: TemplateName
    resize_rule: ResizeRule
    max_new_tokens: int
    batch_size: int


def load_released(folder: Path, *, device: str | None = None) -> ReleasedModel:
    """Load a released folder with the dtype of its weights, onto a GPU if there is one, unless `device` names another
    device. Runs the Python files in the folder, like any loading with `trust_remote_code`."""
    missing = [name for name in _RELEASE_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no released folder: {missing[0]} not found; make one with "
            "`megatron-eve convert megatron-to-hf`."
        )
    check_tokenizer(read_release(folder), load_tokenizer(folder))
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto_processor: Any = AutoProcessor  # untyped upstream
    auto_model: Any = AutoModelForCausalLM
    processor = auto_processor.from_pretrained(folder, trust_remote_code=True)
    model = auto_model.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    return ReleasedModel(model=model.to(target).eval(), processor=processor)


def answer_questions(
    released: ReleasedModel, questions: Sequence[Question], *, options: AnswerOptions
) -> list[str]:
    """The model's answers, in the order of the questions."""
    answers = [""] * len(questions)
    for index, answer in iter_answers(released, questions, options=options):
        answers[index] = answer
    return answers


@torch.inference_mode()
def iter_answers(
    released: ReleasedModel, questions: Sequence[Question], *, options: AnswerOptions
) -> Iterator[tuple[int, str]]:
    """(index of the question, answer), batch by batch, shorter prompts first."""
    if not questions:
        return
    refuse_conversation(released.processor, options.template)
    prompts = _prompts(released.processor, questions, options=options)
    prefix_length = shared_prefix([(prompt.ids, prompt.kinds) for prompt in prompts])
    prefix = _Prefix.of(released.model, prompts[0].ids[:prefix_length])
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for start in range(0, len(order), options.batch_size):
        rows = order[start : start + options.batch_size]
        batch = released.processor.collate(
            [_without_prefix(prompts[row], prefix_length) for row in rows]
        )
        inputs = prefix.prepended_to(batch.to(released.model.device), batch_size=len(rows))
        output = released.model.generate(
            **inputs, max_new_tokens=options.max_new_tokens, do_sample=False
        )
        length = inputs["input_ids"].shape[1]
        texts = released.processor.answers(output, prompt_length=length, template=options.template)
        yield from zip(rows, texts, strict=True)


def refuse_conversation(processor: Any, template: TemplateName) -> None:
    """Raises: ConfigError for questions to a model that was trained on captions alone."""
    if template == "qwen2" and processor.template == "plain":
        raise ConfigError(
            "template=qwen2, but the model was trained on captions alone and holds no conversation; use template plain."
        )


def shared_prefix(prompts: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
    """Number of leading text tokens that all (ids, kinds) have in common; leaves each prompt one token at least."""
    first = prompts[0][0]
    length = min(len(ids) for ids, _ in prompts) - 1
    for ids, kinds in prompts:
        differs = (ids[:length] != first[:length]) | (kinds[:length] != 0)
        length = int(differs.argmax()) if differs.any() else length
    return length


@dataclass(frozen=True, slots=True)
class _Prefix:
    """The beginning of all prompts, and its keys and values in the model's layers."""

    ids: Tensor  # [n]
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer, [1, heads, n, head dim]

    @classmethod
    def of(cls, model: Any, ids: np.ndarray) -> "_Prefix":
        tensor = torch.from_numpy(ids).to(model.device)
        if len(ids) == 0:
            return cls(tensor, [])
        cache = model(tensor[None], use_cache=True, logits_to_keep=1).past_key_values
        return cls(tensor, [(layer.keys, layer.values) for layer in cache.layers])

    def prepended_to(self, batch: Any, *, batch_size: int) -> dict[str, Any]:
        """The arguments of `generate`: whole prompts, and a cache that holds their beginning."""
        inputs = dict(batch)
        if not self.keys_values:
            return inputs
        ids = self.ids.expand(batch_size, -1)
        inputs["input_ids"] = torch.cat((ids, inputs["input_ids"]), dim=1)
        ones = torch.ones_like(ids)
        inputs["attention_mask"] = torch.cat((ones, inputs["attention_mask"]), dim=1)
        if "token_kinds" in inputs:
            kinds = torch.zeros_like(ids)
            inputs["token_kinds"] = torch.cat((kinds, inputs["token_kinds"]), dim=1)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            shape = (batch_size, -1, -1, -1)
            cache.update(keys.expand(shape), values.expand(shape), layer)
        return inputs | {"past_key_values": cache}


def _prompts(processor: Any, questions: Sequence[Question], *, options: AnswerOptions) -> list[Any]:
    """Every question as ids, kinds and patches."""
    paths = {path for question in questions for path in question.images}
    prepared = {path: _image_tokens(processor, path, options.resize_rule) for path in paths}
    texts = [
        processor.prompt(question.text, num_images=len(question.images), template=options.template)
        for question in questions
    ]
    images = [[prepared[path] for path in question.images] for question in questions]
    prompts: list[Any] = processor.expand(texts, images)
    return prompts


def _image_tokens(processor: Any, path: Path, rule: ResizeRule) -> Any:
    try:
        with Image.open(path) as image:
            return processor.image_processor.image_tokens(image, rule=rule)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({error}); give another file."
        ) from error


def _without_prefix(prompt: Any, length: int) -> Any:
    return replace(prompt, ids=prompt.ids[length:], kinds=prompt.kinds[length:])


__all__ = [
    "AnswerOptions",
    "Question",
    "ReleasedModel",
    "answer_questions",
    "iter_answers",
    "load_released",
]
