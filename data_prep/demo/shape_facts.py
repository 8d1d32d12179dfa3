# SPDX-License-Identifier: Apache-2.0
"""What easy-VQA's questions and answers say about an image: its shape and its colour; and sentences about such facts.

An image shows one shape in one colour. Some questions ask for them ("what color is the circle?" also tells the shape),
others ask yes or no ("is there not a blue shape?"). Answers settle both facts for nine images in ten.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_eve.errors import DataError
from megatron_eve.evaluation.scoring import COLORS, SHAPES, YES_NO

CAPTIONS = (  # short, so that both facts are a large part of what a caption's tokens teach
    "A {color} {shape}.",
    "One {color} {shape}.",
    "A {shape} that is {color}.",
    "The {shape} is {color}.",
)
COLOR_QUESTIONS = (
    "what color is the shape?",
    "what is the color of the shape?",
    "what color is the {shape}?",
    "what is the color of the {shape}?",
)
SHAPE_QUESTIONS = (
    "what shape is in the image?",
    "what shape is present?",
    "what shape does the image contain?",
    "what is the {color} shape?",
)
PRESENCE_QUESTIONS = (  # {thing}: "blue shape" or "circle"; whether "yes" means that it is there
    ("is there a {thing}?", True),
    ("is there a {thing} in the image?", True),
    ("is a {thing} present?", True),
    ("does the image contain a {thing}?", True),
    ("is there not a {thing}?", False),
    ("is there not a {thing} in the image?", False),
    ("is no {thing} present?", False),
    ("does the image not contain a {thing}?", False),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about an image, with its answer."""

    text: str
    answer: str

    @property
    def type(self) -> str:
        """The kind of answer: "shape", "color" or "yes/no"."""
        if self.answer in YES_NO:
            return "yes/no"
        return "shape" if self.answer in SHAPES else "color"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What an image shows; None where its questions do not say."""

    shape: str | None
    color: str | None


def derive_facts(questions: Iterable[Question]) -> Facts:
    """Shape and colour that the questions of one image leave possible. Raises DataError on a contradiction."""
    shapes, colors = set(SHAPES), set(COLORS)
    for question in questions:
        _exclude(question, values=shapes)
        _exclude(question, values=colors)
        if not shapes or not colors:
            raise DataError(f"easy-VQA contradicts itself at the question {question.text!r}.")
    return Facts(
        shape=shapes.pop() if len(shapes) == 1 else None,
        color=colors.pop() if len(colors) == 1 else None,
    )


def _exclude(question: Question, *, values: set[str]) -> None:
    """Remove from `values` (possible shapes, or possible colours) what one answer rules out."""
    kind = set(SHAPES if not values.isdisjoint(SHAPES) else COLORS)
    words = set(re.findall(r"\w+", question.text))
    if question.answer in kind:
        values &= {question.answer}
    elif named := words & kind:
        is_denied = bool(words & {"not", "no"})
        if question.answer in YES_NO and (question.answer == "yes") == is_denied:
            values -= named
        else:
            values &= named


def caption(facts: Facts, *, rng: random.Random) -> str:
    """One of the caption sentences about completely known facts."""
    return rng.choice(CAPTIONS).format(shape=facts.shape, color=facts.color)


def ask_everything(facts: Facts, *, rng: random.Random) -> list[Question]:
    """Every form of question once, in random order; half of the yes/no questions name what is there."""
    color, shape = str(facts.color), str(facts.shape)
    questions = [
        Question(text=form.format(shape=shape, color=color), answer=answer)
        for forms, answer in ((COLOR_QUESTIONS, color), (SHAPE_QUESTIONS, shape))
        for form in forms
    ]
    for form, yes_means_present in PRESENCE_QUESTIONS:
        for kind, true_value, ending in ((COLORS, color, " shape"), (SHAPES, shape, "")):
            others = [value for value in kind if value != true_value]
            value = true_value if rng.random() < 0.5 else rng.choice(others)
            says_yes = (value == true_value) == yes_means_present
            questions.append(
                Question(text=form.format(thing=value + ending), answer="yes" if says_yes else "no")
            )
    rng.shuffle(questions)
    return questions
