# SPDX-License-Identifier: Apache-2.0
"""Put prompts about images to a released folder, in batches: texts that it generates, or how likely texts are.

In: a question, its images in order, and how decoding goes. Out: one answer a question, in their order. A batch is
padded on the left, so a prompt gets the answer that it gets alone, up to rounding. Works on the folder's own code
through transformers; knows nothing of lmms-eval. Refuses unknown settings by name."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.inference.answers import refuse_conversation
from megatron_eve.inference.release import check_tokenizer, read_release

ResizeRule = Literal["train", "eval"]
IMAGE_MARK = "<image>"
OFFICIAL_PENALTY = 1.05
"""The official evaluation scripts inherit it from the chat model's generation_config.json."""
OFFICIAL_IMAGE_ID = 0
"""The official code puts it into the prompt's ids at an image; a penalty counts it (eve_arch.py:104-105)."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class AskSettings:
    """The same for all questions of an evaluation."""

    template: TemplateName = "qwen2"
    resize_rule: ResizeRule = "eval"
    repetition_penalty: float = 1.0
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("template", self.template, ("qwen2", "plain")),
            ("resize_rule", self.resize_rule, ("train", "eval")),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value} is unknown; use {' or '.join(choices)}")
        if not self.repetition_penalty > 0:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is none, "
                f"{OFFICIAL_PENALTY} what the official scripts had"
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How one answer is decoded; questions of one batch share it."""

    max_new_tokens: int = 128
    until: tuple[str, ...] = ()  # the answer ends before the first of these
    temperature: float = 0.0  # 0: greedy
    top_p: float | None = None
    num_beams: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question."""

    text: str
    load_images: Callable[[], Sequence[Image.Image]] = tuple  # called once, when it is asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Likelihood:
    """The likelihood of a continuation, given a prompt."""

    log_probability: float  # nats, summed over its tokens
    is_greedy: bool  # whether greedy decoding would write it


class ReleasedFolder:
    """A released folder in memory, and how to ask it."""

    def __init__(
        self, folder: Path, settings: AskSettings, *, device: str, dtype: str = "auto"
    ) -> None:
        """`dtype`: auto (as stored), bfloat16, float16 or float32. Runs the folder's own Python files."""
        if not (folder / "modeling_eve.py").is_file():
            raise CheckpointError(
                f"{folder} is no released folder: modeling_eve.py not found; make one with "
                "`megatron-eve convert release`."
            )
        check_tokenizer(read_release(folder), load_tokenizer(folder))
        auto_processor: Any = AutoProcessor  # untyped upstream
        auto_model: Any = AutoModelForCausalLM
        self.settings = settings
        self.processor = auto_processor.from_pretrained(folder, trust_remote_code=True)
        refuse_conversation(self.processor, settings.template)
        model = auto_model.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        self.model = model.to(device).eval()
        self.device = torch.device(device)

    @property
    def max_length(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def prompt(self, question: str, *, num_images: int) -> str:
        """The question in the template, images in front of it unless it has a mark for each."""
        if self.settings.template == "plain":
            return IMAGE_MARK * num_images
        marks = question.count(IMAGE_MARK)
        if marks == num_images and marks:
            return str(self.processor.prompt(question, num_images=0))
        if marks:
            _LOG.warning("%d marks %s, %d images: put in front", marks, IMAGE_MARK, num_images)
        bare = question.replace(IMAGE_MARK, "")
        return str(self.processor.prompt(bare, num_images=num_images))

    def prepared(self, asked: Asked) -> Any:
        """Ids, kinds and patches of one prompt (the processor's PromptTokens)."""
        tokens = [
            self.processor.image_processor.image_tokens(image, rule=self.settings.resize_rule)
            for image in asked.load_images()
        ]
        prompt = self.prompt(asked.text, num_images=len(tokens))
        return self.processor.expand([prompt], [tokens])[0]

    def answers(self, questions: Sequence[Asked], decoding: Decoding) -> Iterator[tuple[int, str]]:
        """(index of the question, answer), batch by batch."""
        for rows in self._batches(questions):
            texts = self._generate([self.prepared(questions[row]) for row in rows], decoding)
            yield from zip(rows, texts, strict=True)

    def _batches(self, questions: Sequence[Asked]) -> Iterator[list[int]]:
        """Indices, longest texts first: little padding, and a lack of memory shows early."""
        order = sorted(range(len(questions)), key=lambda index: -len(questions[index].text))
        size = self.settings.batch_size
        yield from (order[start : start + size] for start in range(0, len(order), size))

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Any], decoding: Decoding) -> list[str]:
        batch = self.processor.collate(prompts).to(self.device)
        if self.settings.repetition_penalty != 1 and "token_kinds" in batch:
            # The model does not read the ids of images, a penalty does: give it those of the official code.
            is_image = batch["token_kinds"] != 0
            batch["input_ids"] = batch["input_ids"].masked_fill(is_image, OFFICIAL_IMAGE_ID)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
        if decoding.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": decoding.temperature,
                "top_p": decoding.top_p,
            }
        output = self.model.generate(
            **batch,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            repetition_penalty=self.settings.repetition_penalty,
            **sampling,
        )
        template = self.settings.template
        texts = self.processor.answers(
            output, prompt_length=batch["input_ids"].shape[1], template=template
        )
        # A caption ends with its line, whatever the task asks for.
        return texts if template == "plain" else [cut(text, decoding.until) for text in texts]

    def likelihoods(
        self, questions: Sequence[Asked], continuations: Sequence[str]
    ) -> Iterator[tuple[int, Likelihood]]:
        """(index, likelihood) of each continuation after its question, as an answer is written: one space first."""
        for rows in self._batches(questions):
            prompts = [self.prepared(questions[row]) for row in rows]
            found = self._likelihoods(prompts, [continuations[row] for row in rows])
            yield from zip(rows, found, strict=True)

    @torch.inference_mode()
    def _likelihoods(self, prompts: Sequence[Any], texts: Sequence[str]) -> list[Likelihood]:
        answers = [self._answer_ids(text) for text in texts]
        extended = [
            type(prompt)(
                ids=torch.cat((torch.from_numpy(prompt.ids), answer)).numpy(),
                kinds=torch.cat((torch.from_numpy(prompt.kinds), torch.zeros_like(answer))).numpy(),
                patches=prompt.patches,
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        batch = self.processor.collate(extended).to(self.device)
        longest = max(len(answer) for answer in answers)
        logits = self.model(**batch, logits_to_keep=longest + 1).logits[:, :-1].log_softmax(-1)
        return [
            _likelihood(logits[row, longest - len(answer) :], answer.to(self.device))
            for row, answer in enumerate(answers)
        ]

    def _answer_ids(self, text: str) -> Tensor:
        """Token ids of an answer after `ASSISTANT:`, or of a caption after its image."""
        written = text.strip() if self.settings.template == "plain" else f" {text.strip()}"
        ids = self.processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)


def _likelihood(log_probabilities: Tensor, ids: Tensor) -> Likelihood:
    """[n, V] at the positions that predict the n `ids`."""
    chosen = log_probabilities.gather(1, ids[:, None])[:, 0]
    is_greedy = bool((log_probabilities.argmax(-1) == ids).all())
    return Likelihood(log_probability=float(chosen.double().sum()), is_greedy=is_greedy)


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop texts."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text.strip()
