# SPDX-License-Identifier: Apache-2.0
"""Which conversations can be trained on. The build of shards and the training ask this one module, so they agree.

In: the turns of a sample, how many images it has, and a template. Out: nothing, or `SampleError` with the reason. It
looks at text alone; what only a tokenizer can tell (a text that is cut before its image) is refused by conversation.py.

  turns      [system] [gpt] human gpt human gpt ...; a leading answer is left out, as in the official code
  plain      one question, whose words are not used, and one caption; one image needs no mark
  qwen2      as many `<image>` as images, in questions; no question and no answer is empty
  both       no text holds a mark that is not read, or a token that ends or pads a text

A blank answer (white space) among others is trained as in the official code; a sample without any other answer is
refused.

Source: preprocess_plain and preprocess_eve of the official train.py: what makes every label masked there is refused
here, and docs/migration.md names what is refused although it trains there.
"""

from collections.abc import Sequence

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.media_names import IMAGE_MARK, unread_mark
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.sample import Turn

HUMAN, GPT, SYSTEM = "human", "gpt", "system"
ROLES = (HUMAN, GPT, SYSTEM)
END_TEXTS = ("<|im_end|>", "<|endoftext|>")
"""End of an answer and padding. In a text they make the official code mask every label; other special tokens
(`<|box_start|>`, `<|im_start|>`) are words like any other, there and here."""


def templates_that_train(turns: Sequence[Turn], *, num_images: int) -> tuple[TemplateName, ...]:
    """The templates that can train this conversation. Raises SampleError (of qwen2) if none can."""
    found: list[TemplateName] = []
    refused: list[SampleError] = []
    check_texts(turns)
    templates: tuple[TemplateName, ...] = ("qwen2", "plain")
    for template in templates:
        try:
            _check_template(turns, num_images=num_images, template=template)
            found.append(template)
        except SampleError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return tuple(found)


def check_conversation(
    turns: Sequence[Turn],
    *,
    num_images: int,
    template: TemplateName,
    end_texts: Sequence[str] = END_TEXTS,
) -> None:
    """Raises SampleError unless `template` can train this conversation. `end_texts`: a tokenizer may have ends of its
    own, beside END_TEXTS."""
    check_texts(turns, end_texts=end_texts)
    _check_template(turns, num_images=num_images, template=template)


def _check_template(turns: Sequence[Turn], *, num_images: int, template: TemplateName) -> None:
    spoken = spoken_turns(turns)
    roles = [turn.role for turn in spoken]
    found = f"roles are {' '.join(turn.role for turn in turns)}"[:200]
    if GPT not in roles:
        raise SampleError("no_answer", found)
    if roles != [(HUMAN, GPT)[i % 2] for i in range(len(roles))]:
        raise SampleError("turns_not_alternating", found)
    if roles[-1] != GPT:
        raise SampleError("unanswered_turn", found)
    if template == "plain":
        if len(turns) - len(system_turns(turns)) != 2:
            raise SampleError("not_two_turns", f"plain takes a human and a gpt turn, {found}")
    else:
        _check_questions(turns)
    _check_answers(spoken)
    check_marks(turns, num_images=num_images, template=template)


def system_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The leading system turn, if there is one."""
    return tuple(turns[:1]) if turns and turns[0].role == SYSTEM else ()


def spoken_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns after the system text and a leading answer, which the official code leaves out, too."""
    rest = tuple(turns[len(system_turns(turns)) :])
    return rest[1:] if rest and rest[0].role == GPT else rest


def check_texts(
    turns: Sequence[Turn], *, end_texts: Sequence[str] = END_TEXTS, is_prompt: bool = False
) -> None:
    """Roles that are known, `<image>` in questions only, no unread mark, no token that ends a text.

    A prompt may spell other marks: who asks sends pictures as pictures, and `{image}` in a question is code."""
    for number, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise SampleError(
                "unknown_role",
                f"turn {number} is from {turn.role[:40]!r}, known are {', '.join(ROLES)}",
            )
        if turn.role == SYSTEM and number > 0:
            raise SampleError(
                "turns_not_alternating", f"turn {number} is from system, which may only come first"
            )
        mark = None if is_prompt else unread_mark(turn.text, in_question=turn.role != GPT)
        if mark is not None:
            raise SampleError(
                "unread_mark",
                f"turn {number} holds {mark!r}, which is not read; only {IMAGE_MARK} is",
            )
        found = next((token for token in end_texts if token in turn.text), None)
        if found is not None:
            raise SampleError("special_text", f"turn {number} contains the special token {found}")
        if turn.role != HUMAN and IMAGE_MARK in turn.text:
            raise SampleError(
                "mark_in_answer" if turn.role == GPT else "mark_in_system",
                f"turn {number}, from {turn.role}, contains {IMAGE_MARK}; only questions may",
            )


def check_marks(turns: Sequence[Turn], *, num_images: int, template: TemplateName) -> None:
    """As many marks as images. `plain` puts the mark itself, so that one image may have none."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks == num_images or (template == "plain" and num_images == 1 and marks == 0):
        return
    found = f"{marks} marks {IMAGE_MARK}, {num_images} images"
    if marks == 0:
        raise SampleError("image_without_mark", found)
    raise SampleError(
        "fewer_marks_than_images" if marks < num_images else "more_marks_than_images", found
    )


def _check_questions(turns: Sequence[Turn]) -> None:
    """`""`, to which the official template writes no space: every label is masked there. White space is a question."""
    has_system = any(turn.text.strip() for turn in system_turns(turns))
    questions = [turn for turn in spoken_turns(turns) if turn.role == HUMAN]
    for number, turn in enumerate(questions):
        if turn.text == "" and not (has_system and number == 0):
            raise SampleError("empty_question", f"question {number} has no text")


def _check_answers(spoken: Sequence[Turn]) -> None:
    answers = [turn.text for turn in spoken if turn.role == GPT]
    if not any(answer.strip() for answer in answers):
        raise SampleError("empty_answer", "no answer has a text")
    if "" in answers:
        raise SampleError("empty_answer", f"answer {answers.index('')} has no text at all")
