# SPDX-License-Identifier: Apache-2.0
"""From turns to token ids and labels, by the templates `plain` and `qwen2`.

Comes in: the turns of a sample and its number of images. Goes out: ids in which every image is ONE
placeholder, and labels. Refuses, as `SampleError`: every case in which the official code silently
drops a sample, feeds the next sample's image, or computes a NaN loss (text_rules.py, which the build
of shards asks, too).

  plain   <image>CAPTION\n                      trained: the caption and its newline; no end token; human text unused
  qwen2   SYSTEM USER: Q ASSISTANT: A<|im_end|>USER: Q2 ASSISTANT: A2<|im_end|>
                                                trained: what follows `ASSISTANT:` up to and
                                                including <|im_end|>

Token ids equal the official ones (train.py:140-264, conversation.py:183-215, mm_utils.py:35-55),
which split the text at <image> and tokenise each piece as a whole. We tokenise by segments and so
know the label spans for certain: a segment ends at an image, after `ASSISTANT:` (the answer's
segment starts with a space, where byte-level BPE splits anyway) and at <|im_end|> (an added token).
Hence an answer that contains ` ASSISTANT:` is fine here; the official code masks that whole sample.

Images: a turn with one mark is cleaned as in the official code: the mark is removed, the text
stripped, `<image>\n` put in front; a question that is only an image has no newline in training (the
official clean-up strips once more) but has it in a prompt (official inference does not clean). A turn
with several marks, which the official code would collapse into one, keeps each at its place. A
text-only sample in `plain` has labels on all its text.

A leading system turn stands in front of the first question, behind its images, as the system message
of a request does at inference; the template's own system text stays. `plain` has no place for it.

The limit of text counts an image's placeholder as one token, as the official collator does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.media_names import IMAGE_MARK
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.text_rules import (
    check_conversation,
    check_marks,
    check_texts,
    spoken_turns,
    system_turns,
)
from megatron_eve.data.read.tokenizer import STOP_TEXT as STOP_TEXT
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import IGNORE, Sample, Turn

IMAGE_PLACEHOLDER = -200
"""Stands for one image in `EncodedSample.ids` (official IMAGE_TOKEN_INDEX)."""
SYSTEM_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample as tokens, images not yet expanded."""

    ids: NDArray[np.int64]  # [S]; an image is one IMAGE_PLACEHOLDER
    labels: NDArray[np.int64]  # [S]: the token's own id where it is to be predicted, else IGNORE
    was_cut: bool  # text was cut at max_text_tokens

    @property
    def num_images(self) -> int:
        return int(np.count_nonzero(self.ids == IMAGE_PLACEHOLDER))

    @property
    def num_text(self) -> int:
        return int(self.ids.size) - self.num_images

    @property
    def num_labels(self) -> int:
        """Tokens to predict; nothing predicts the first."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


@dataclass(frozen=True, slots=True)
class _Segment:
    """A piece of a conversation: text to tokenise, an image (text is IMAGE_MARK) or the stop token
    (STOP_TEXT)."""

    text: str
    trained: bool


def encode_sample(
    turns: Sequence[Turn],
    *,
    num_images: int,
    template: TemplateName,
    tokenizer: Tokenizer,
    max_text_tokens: int,
) -> EncodedSample:
    """Token ids and labels of one training sample. Raises SampleError if it cannot be trained
    on."""
    segments = _training_segments(
        turns, num_images=num_images, template=template, tokenizer=tokenizer
    )
    ids, trained = _tokenize([segments], tokenizer=tokenizer)[0]
    return _cut(ids, trained, max_text_tokens=max_text_tokens)


def encode_samples(
    samples: Sequence[Sample],
    *,
    template: TemplateName,
    tokenizer: Tokenizer,
    max_text_tokens: int,
) -> list[EncodedSample | SampleError]:
    """`encode_sample` of many, tokenised on all cores; a sample that it would refuse gives the
    error instead.

    A sample's images are counted by `image_sizes`, so that headers read without image bytes will
    do."""
    results: list[EncodedSample | SampleError | None] = []
    todo: list[list[_Segment]] = []
    for sample in samples:
        try:
            todo.append(
                _training_segments(
                    sample.turns,
                    num_images=len(sample.image_sizes),
                    template=template,
                    tokenizer=tokenizer,
                )
            )
            results.append(None)
        except SampleError as error:
            results.append(error)
    tokenized = iter(_tokenize(todo, tokenizer=tokenizer))
    finished: list[EncodedSample | SampleError] = []
    for result in results:
        if result is not None:
            finished.append(result)
            continue
        try:
            finished.append(_cut(*next(tokenized), max_text_tokens=max_text_tokens))
        except SampleError as error:
            finished.append(error)
    return finished


def encode_prompt(
    turns: Sequence[Turn], *, num_images: int, template: TemplateName, tokenizer: Tokenizer
) -> NDArray[np.int64]:
    """Ids after which the model is to write its answer; images as IMAGE_PLACEHOLDER.

    `qwen2`: turns alternate and end with a human one; the prompt ends with `ASSISTANT:`, no space.
    `plain`: the images alone, whatever the one human turn says. Raises SampleError like
    `encode_sample`."""
    check_texts(turns, end_texts=tokenizer.end_texts, is_prompt=True)
    check_marks(turns, num_images=num_images, template="qwen2")
    images_alone = [_Segment(IMAGE_MARK, False)] * num_images
    segments = images_alone if template == "plain" else _prompt_segments(turns)
    return _tokenize([segments], tokenizer=tokenizer)[0][0]


def _training_segments(
    turns: Sequence[Turn], *, num_images: int, template: TemplateName, tokenizer: Tokenizer
) -> list[_Segment]:
    check_conversation(
        turns, num_images=num_images, template=template, end_texts=tokenizer.end_texts
    )
    if template == "plain":
        caption = spoken_turns(turns)[1].text.strip()
        return [_Segment(IMAGE_MARK, False)] * num_images + [_Segment(caption + "\n", True)]
    spoken = spoken_turns(turns)
    questions = _questions(turns, strip_lone_mark=True)
    segments: list[_Segment] = []
    for question, answer in zip(questions, spoken[1::2], strict=True):
        segments += _split_at_marks(question)
        segments += [_Segment(f" {answer.text}", True), _Segment(STOP_TEXT, True)]
    return segments


def _prompt_segments(turns: Sequence[Turn]) -> list[_Segment]:
    """A Vicuna-style conversation whose last turn is a question to be answered."""
    spoken = spoken_turns(turns)
    roles = [turn.role for turn in spoken]
    if roles != ["human" if i % 2 == 0 else "gpt" for i in range(len(roles))]:
        raise SampleError("turns_not_alternating", f"roles are {roles}")
    if not roles or roles[-1] == "gpt":
        raise SampleError("no_answer", f"a prompt must end with a human turn, roles are {roles}")
    segments: list[_Segment] = []
    for number, question in enumerate(_questions(turns, strip_lone_mark=False)):
        segments += _split_at_marks(question)
        if 2 * number + 1 < len(spoken):
            answer = spoken[2 * number + 1].text
            if not answer.strip():
                raise SampleError("empty_answer", f"answer {number} of the prompt has no text")
            segments += [_Segment(f" {answer}", True), _Segment(STOP_TEXT, True)]
    return segments


def _questions(turns: Sequence[Turn], *, strip_lone_mark: bool) -> list[str]:
    """The questions as the template writes them, from `USER:` to `ASSISTANT:`; the system texts are in the first."""
    system = "".join(turn.text for turn in system_turns(turns)).strip()
    questions = []
    for number, turn in enumerate(spoken_turns(turns)[::2]):
        text = _clean(turn.text)
        if number == 0:
            text = _behind_marks(text, system)
        if strip_lone_mark and text == f"{IMAGE_MARK}\n":
            text = IMAGE_MARK
        opening = f"{SYSTEM_TEXT} " if number == 0 else ""
        questions.append(f"{opening}USER: {text} ASSISTANT:")
    return questions


def _behind_marks(question: str, system: str) -> str:
    """The question with a system text in front of its words, after the marks that it starts with."""
    if not system:
        return question
    words, marks = question, ""
    while words.startswith(f"{IMAGE_MARK}\n"):
        words, marks = words.removeprefix(f"{IMAGE_MARK}\n"), f"{marks}{IMAGE_MARK}\n"
    return marks + "\n".join(text for text in (system, words) if text)


def _clean(text: str) -> str:
    """A human turn with its image marks where the template wants them (module docstring)."""
    if text.count(IMAGE_MARK) != 1:
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}"


def _split_at_marks(text: str) -> list[_Segment]:
    pieces = text.split(IMAGE_MARK)
    segments = [_Segment(pieces[0], False)]
    for piece in pieces[1:]:
        segments += [_Segment(IMAGE_MARK, False), _Segment(piece, False)]
    return segments


def _tokenize(
    conversations: Sequence[Sequence[_Segment]], *, tokenizer: Tokenizer
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """(ids, is trained) of each conversation; texts of all conversations go through the tokenizer
    together."""
    fixed = {
        IMAGE_MARK: np.array([IMAGE_PLACEHOLDER], dtype=np.int64),
        STOP_TEXT: np.array([tokenizer.token_id(STOP_TEXT)], dtype=np.int64),
    }
    texts = [s.text for segments in conversations for s in segments if s.text not in fixed]
    encoded = iter(tokenizer.encode_many(texts))
    results = []
    for segments in conversations:
        pieces = [
            fixed[s.text] if s.text in fixed else np.asarray(next(encoded), dtype=np.int64)
            for s in segments
        ]
        trained = [np.full(p.size, s.trained) for p, s in zip(pieces, segments, strict=True)]
        results.append(
            (
                np.concatenate([np.empty(0, np.int64), *pieces]),
                np.concatenate([[False][:0], *trained]),
            )
        )
    return results


def _cut(
    ids: NDArray[np.int64], trained: NDArray[np.bool_], *, max_text_tokens: int
) -> EncodedSample:
    """Labels, after cutting to the first `max_text_tokens` tokens; an image counts as one."""
    if (ids[max_text_tokens:] == IMAGE_PLACEHOLDER).any():
        raise SampleError("cut_image", f"an image comes after the first {max_text_tokens} tokens")
    ids, was_cut = ids[:max_text_tokens], ids.size > max_text_tokens
    labels = np.where(trained[:max_text_tokens], ids, IGNORE)
    if not (labels[1:] != IGNORE).any():
        raise SampleError(
            "cut_labels", f"no token to predict among the first {max_text_tokens} tokens"
        )
    return EncodedSample(ids=ids, labels=labels, was_cut=was_cut)
