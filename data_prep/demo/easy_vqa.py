# SPDX-License-Identifier: Apache-2.0
"""easy-VQA (5,000 images of a coloured shape, 48,248 questions; MIT licence) as EVE/LLaVA annotations.

    OUT/images/{train,test}/ID.png   the package's files, unchanged
    OUT/captions_{train,test}.json   stages 1 and 2.1: image -> one sentence
    OUT/questions_train.json         stages 2.2 and 3: the questions of an image in conversations of up to three
    OUT/questions_test.json          evaluation: one record per question: id, image, question, answer, type
    OUT/text.json                    first training of a tiny language model: documents in the same language, no images
    OUT/about.json                   counts and origin

The split is the official one. Captions say what the official answers say; an image whose answers leave its shape or
colour open has no caption (it keeps its questions), and about.json counts it. All choices are functions of the id.

Source: the PyPI package easy-vqa 1.0 (https://github.com/vzhou842/easy-VQA).
"""

import importlib
import random
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_eve.whole import write_json

from ..output import new_folder
from .packages import package_folder
from .shape_facts import (
    CAPTIONS,
    COLORS,
    SHAPES,
    Facts,
    Question,
    ask_everything,
    caption,
    derive_facts,
)

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
QUESTIONS_PER_CONVERSATION = 3
TEXT_ROUNDS = 4
"""How often text.json goes through all facts and opening sentences."""
RETELLINGS = 4
"""Sentences after the opening in a document that says it again."""
TEXT_REQUEST = "Write a text."
"""The human turn of a document; template `plain` leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EasyVqaImage:
    """One image and everything that is asked about it, in the package's order."""

    split: Split
    number: int
    path: Path
    questions: tuple[Question, ...]

    @property
    def id(self) -> str:
        return f"easy-vqa-{self.split}-{self.number}"

    @property
    def relative_path(self) -> str:
        return f"images/{self.split}/{self.number}.png"


def write_easy_vqa(out: Path, *, overwrite: bool) -> dict[str, int]:
    """Write everything to `out`; returns the counts of about.json."""
    images = {split: read_split(split) for split in SPLITS}
    counts: dict[str, int] = {}
    with new_folder(out, overwrite=overwrite) as folder:
        for split in SPLITS:
            _copy_images(images[split], folder=folder)
            captions = [record for image in images[split] for record in caption_records(image)]
            write_json(folder / f"captions_{split}.json", captions)
            counts[f"images_{split}"] = len(images[split])
            counts[f"captions_{split}"] = len(captions)
            counts[f"images_without_caption_{split}"] = len(images[split]) - len(captions)
            counts[f"questions_{split}"] = sum(len(image.questions) for image in images[split])
        conversations = [
            record for image in images["train"] for record in conversation_records(image)
        ]
        write_json(folder / "questions_train.json", conversations)
        tests = [record for image in images["test"] for record in question_records(image)]
        write_json(folder / "questions_test.json", tests)
        texts = text_records()
        write_json(folder / "text.json", texts)
        counts["conversations_train"] = len(conversations)
        counts["text_conversations"] = len(texts)
        about = {"package": "easy-vqa 1.0", "license": "MIT", "counts": counts}
        write_json(folder / "about.json", about)
    return counts


def read_split(split: Split) -> list[EasyVqaImage]:
    """The images of one official split, by number."""
    package_folder("easy_vqa", install="easy-vqa")
    package = importlib.import_module("easy_vqa")
    if split == "train":
        paths, columns = package.get_train_image_paths(), package.get_train_questions()
    else:
        paths, columns = package.get_test_image_paths(), package.get_test_questions()
    by_image: dict[int, list[Question]] = defaultdict(list)
    for text, answer, number in zip(*columns, strict=True):
        by_image[number].append(Question(text=text, answer=answer))
    return [
        EasyVqaImage(split=split, number=number, path=Path(path), questions=tuple(by_image[number]))
        for number, path in sorted(paths.items())
    ]


def caption_records(image: EasyVqaImage) -> list[dict[str, object]]:
    """The caption of an image as a list of one sample, or of none if its facts are not complete."""
    facts = derive_facts(image.questions)
    if facts.shape is None or facts.color is None:
        return []
    text = caption(facts, rng=random.Random(f"caption {image.id}"))
    turns = _turns([("<image>", text)])
    return [{"id": image.id, "image": image.relative_path, "conversations": turns}]


def conversation_records(image: EasyVqaImage) -> list[dict[str, object]]:
    """The questions of an image, each once, in conversations of a few turns: in long ones most answers follow from
    earlier turns, and the image teaches little."""
    questions = list(image.questions)
    random.Random(f"questions {image.id}").shuffle(questions)
    pairs = [(question.text, question.answer) for question in questions]
    records: list[dict[str, object]] = []
    for start in range(0, len(pairs), QUESTIONS_PER_CONVERSATION):
        few = pairs[start : start + QUESTIONS_PER_CONVERSATION]
        few[0] = (f"<image>\n{few[0][0]}", few[0][1])
        name = f"{image.id}-{start // QUESTIONS_PER_CONVERSATION}"
        records.append({"id": name, "image": image.relative_path, "conversations": _turns(few)})
    return records


def question_records(image: EasyVqaImage) -> list[dict[str, object]]:
    """The questions of an image, one evaluation record each."""
    return [
        {
            "id": f"{image.id}-{number}",
            "image": image.relative_path,
            "question": question.text,
            "answer": question.answer,
            "type": question.type,
        }
        for number, question in enumerate(image.questions)
    ]


def text_records() -> list[dict[str, object]]:
    """Documents without images, for template `plain`, about every shape, colour and opening sentence: half of all
    question forms each after the opening, and the opening said again in other words."""
    records: list[dict[str, object]] = []
    for turn in range(TEXT_ROUNDS):
        for shape in SHAPES:
            for color in COLORS:
                facts = Facts(shape=shape, color=color)
                for number, form in enumerate(CAPTIONS):
                    name = f"easy-vqa-text-{turn}-{shape}-{color}-{number}"
                    opening = form.format(shape=shape, color=color)
                    rng = random.Random(name)
                    questions = ask_everything(facts, rng=rng)
                    middle = len(questions) // 2
                    texts = {
                        "a": _asked(questions[:middle]),
                        "b": _asked(questions[middle:]),
                        "c": " ".join(caption(facts, rng=rng) for _ in range(RETELLINGS)),
                    }
                    records += [
                        _document(f"{name}-{kind}", f"{opening} {text}")
                        for kind, text in texts.items()
                    ]
    random.Random("easy-vqa text").shuffle(records)
    return records


def _asked(questions: Iterable[Question]) -> str:
    return " ".join(f"USER: {question.text} ASSISTANT: {question.answer}" for question in questions)


def _document(name: str, text: str) -> dict[str, object]:
    return {"id": name, "conversations": _turns([(TEXT_REQUEST, text)])}


def _turns(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        turn
        for question, answer in pairs
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
    ]


def _copy_images(images: Iterable[EasyVqaImage], *, folder: Path) -> None:
    for image in images:
        path = folder / image.relative_path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image.path, path)
