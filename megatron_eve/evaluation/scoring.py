# SPDX-License-Identifier: Apache-2.0
"""Counts right answers, and compares them with the same model's for the wrong image and with the best guess without
any image.

In: questions with their types, expected answers and the model's answers. Out: a table by type, and whether the model
sees: the types of question that it `must_see` are right in 80% of cases, and with a wrong image no better than the best
guess from the question alone plus 5 points.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MIN_RIGHT = 0.80
MAX_ABOVE_GUESS = 0.05
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
YES_NO = ("yes", "no")
OPEN = "open (shape and color)"
GROUPS: dict[str, tuple[str, ...]] = {
    "shape": ("shape",),
    "color": ("color",),
    OPEN: ("shape", "color"),
    "yes/no": ("yes/no",),
}
MUST_SEE = ("shape", "color", OPEN)
"""What a demonstration must show unless it says otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One question and all answers to it."""

    id: str
    image: str
    wrong_image: str
    question: str
    type: str
    expected: str
    answer: str  # with the right image
    answer_wrong_image: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Shares of right answers to one group of questions."""

    name: str
    num_questions: int
    right_image: float
    wrong_image: float
    question_alone: float  # for each question its most frequent answer in training
    majority: float  # always the type's most frequent answer in training


class Guesses:
    """The best answers without an image, from (question, answer) pairs of the training set."""

    def __init__(self, pairs: Iterable[tuple[str, str]], *, types: Mapping[str, str]) -> None:
        """`types`: answer -> type of question."""
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[str, Counter[str]] = defaultdict(Counter)
        for question, answer in pairs:
            by_question[question][normalised(answer)] += 1
            if answer in types:
                by_type[types[answer]][normalised(answer)] += 1
        self._of_question = {key: most_frequent(counts) for key, counts in by_question.items()}
        self._of_type = {key: most_frequent(counts) for key, counts in by_type.items()}

    def from_question(self, question: str, *, kind: str) -> str:
        """For a question that training did not have, the guess is that of its type."""
        return self._of_question.get(question, self.from_type(kind))

    def from_type(self, kind: str) -> str:
        return self._of_type.get(kind, "")


def normalised(answer: str) -> str:
    """The form that is compared: no white space around, lower case."""
    return answer.strip().lower()


def most_frequent(counts: Counter[str]) -> str:
    """The most frequent answer; of equals the first in the alphabet."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def wrong_images(images: Sequence[str], *, seed: int) -> dict[str, str]:
    """Another image for each image, every image once: a random order in which each is replaced by the next."""
    order = sorted(set(images))
    if len(order) < 2:
        raise ValueError(f"{len(order)} image has no other one; give at least 2.")
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def score(answered: Sequence[Answered], *, guesses: Guesses) -> list[Row]:
    """One row for each group that has questions."""
    rows = []
    for name, types in GROUPS.items():
        group = [one for one in answered if one.type in types]
        if group:
            rows.append(_row(name, group, guesses=guesses))
    return rows


def _row(name: str, group: Sequence[Answered], *, guesses: Guesses) -> Row:
    def share(found: Iterable[str]) -> float:
        pairs = zip(group, found, strict=True)
        return sum(normalised(one.expected) == normalised(a) for one, a in pairs) / len(group)

    return Row(
        name=name,
        num_questions=len(group),
        right_image=share(one.answer for one in group),
        wrong_image=share(one.answer_wrong_image for one in group),
        question_alone=share(guesses.from_question(one.question, kind=one.type) for one in group),
        majority=share(guesses.from_type(one.type) for one in group),
    )


def shortfalls(rows: Sequence[Row], *, must_see: Sequence[str] = MUST_SEE) -> list[str]:
    """What the table lacks to show that the model sees; empty if it does."""
    by_name = {row.name: row for row in rows}
    found = [f"no {name} questions were asked" for name in must_see if name not in by_name]
    for row in (by_name[name] for name in must_see if name in by_name):
        if row.right_image < MIN_RIGHT:
            found.append(
                f"{row.name}: {row.right_image:.1%} with the right image, expected at least {MIN_RIGHT:.0%}"
            )
        limit = row.question_alone + MAX_ABOVE_GUESS
        if row.wrong_image > limit:
            found.append(
                f"{row.name}: {row.wrong_image:.1%} with a wrong image, expected at most {limit:.1%} "
                f"(guess from the question {row.question_alone:.1%} plus 5 points)"
            )
    return found


def verdict(rows: Sequence[Row], *, must_see: Sequence[str] = MUST_SEE) -> str:
    """One line."""
    if problems := shortfalls(rows, must_see=must_see):
        return "NOT MET: " + "; ".join(problems)
    seen = [
        f"{row.name} {row.right_image:.1%} with the right image (at least {MIN_RIGHT:.0%}), {row.wrong_image:.1%} with "
        f"a wrong one (at most {row.question_alone + MAX_ABOVE_GUESS:.1%})"
        for row in rows
        if row.name in must_see
    ]
    return "MET: the model sees. " + "; ".join(seen) + "."


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as a Markdown table, readable on a console."""
    heads = (
        "questions",
        "number",
        "right image",
        "wrong image",
        "question alone",
        "majority answer",
    )
    cells = [
        (
            row.name,
            f"{row.num_questions:,}",
            *(
                f"{share:.1%}"
                for share in (row.right_image, row.wrong_image, row.question_alone, row.majority)
            ),
        )
        for row in rows
    ]
    return aligned(heads, cells)


def aligned(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with columns of equal width; all but the first to the right."""
    widths = [max(len(row[column]) for row in [heads, *cells]) for column in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        parts = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return "| " + " | ".join(parts) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(heads), line(rule), *map(line, cells)]
