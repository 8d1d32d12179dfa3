# SPDX-License-Identifier: Apache-2.0
"""Ask a released model the questions of easy-VQA's official test split, with the right image and with a wrong one.

    python -m megatron_eve.evaluation.easy_vqa runs/demo/hf runs/demo/data/easy-vqa runs/demo

Writes answers.jsonl (every question with both answers), results.json and results.md (table and verdict). Exit codes: 0
evaluated (the verdict is in the results), 1 the model or the data are bad, 2 wrong usage."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eve.command import end_with, reports_errors
from megatron_eve.data.read.media_names import IMAGE_MARK
from megatron_eve.errors import DataError
from megatron_eve.evaluation.scoring import (
    COLORS,
    GROUPS,
    MUST_SEE,
    SHAPES,
    YES_NO,
    Answered,
    Guesses,
    score,
    shortfalls,
    table,
    verdict,
    wrong_images,
)
from megatron_eve.whole import write_json

ANSWERS_FILE, RESULTS_FILE, RESULTS_TEXT_FILE = "answers.jsonl", "results.json", "results.md"
WRONG_IMAGE_SEED = 42
MAX_NEW_TOKENS = 4  # an answer is one word; `yellow` has the most tokens
BATCH_SIZE = 256
TYPE_OF_ANSWER = {
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(YES_NO, "yes/no"),
}


def official_test_questions(easy_vqa: Path, *, num_images: int | None) -> list[dict[str, str]]:
    """Records of questions_test.json; with `num_images` those of the first images only."""
    records: list[dict[str, str]] = _read_json(easy_vqa / "questions_test.json")
    images = list(dict.fromkeys(record["image"] for record in records))
    if num_images is None:
        return records
    if not 2 <= num_images <= len(images):
        raise DataError(
            f"--images {num_images}: the test split has {len(images):,} images; give 2 to {len(images):,}."
        )
    chosen = set(images[:num_images])
    return [record for record in records if record["image"] in chosen]


def training_pairs(easy_vqa: Path) -> Iterator[tuple[str, str]]:
    """(question, answer) of questions_train.json."""
    for record in _read_json(easy_vqa / "questions_train.json"):
        turns = record["conversations"]
        for asked, answered in zip(turns[::2], turns[1::2], strict=True):
            yield asked["value"].replace(IMAGE_MARK, "").strip(), answered["value"]


def ask(
    folder: Path, records: Sequence[dict[str, str]], *, easy_vqa: Path, batch_size: int
) -> list[Answered]:
    """Both answers to every question."""
    from megatron_eve.inference.answers import load_released  # seconds to import

    released = load_released(folder)
    images = [record["image"] for record in records]
    other = wrong_images(images, seed=WRONG_IMAGE_SEED)
    questions = [record["question"] for record in records]
    right = _answers(released, questions, [easy_vqa / i for i in images], batch_size=batch_size)
    wrong = _answers(
        released, questions, [easy_vqa / other[i] for i in images], batch_size=batch_size
    )
    return [
        Answered(
            id=record["id"],
            image=record["image"],
            wrong_image=other[record["image"]],
            question=record["question"],
            type=record["type"],
            expected=record["answer"],
            answer=with_right,
            answer_wrong_image=with_wrong,
        )
        for record, with_right, with_wrong in zip(records, right, wrong, strict=True)
    ]


def _answers(
    released: Any, questions: Sequence[str], images: Sequence[Path], *, batch_size: int
) -> list[str]:
    from megatron_eve.inference.answers import AnswerOptions, Question, iter_answers

    asked = [
        Question(text=question, images=(image,))
        for question, image in zip(questions, images, strict=True)
    ]
    options = AnswerOptions(
        template="qwen2",
        resize_rule="train",
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
    )
    answers = [""] * len(asked)
    with tqdm(total=len(asked), unit=" questions", mininterval=2) as bar:
        for index, answer in iter_answers(released, asked, options=options):
            answers[index] = answer
            bar.update()
    return answers


def write_results(
    answered: Sequence[Answered],
    out: Path,
    *,
    guesses: Guesses,
    about: dict[str, object],
    must_see: Sequence[str] = MUST_SEE,
) -> list[str]:
    """Write the three files; returns the lines of results.md."""
    rows = score(answered, guesses=guesses)
    lines = [*table(rows), "", verdict(rows, must_see=must_see)]
    out.mkdir(parents=True, exist_ok=True)
    with (out / ANSWERS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(one)) + "\n" for one in answered)
    (out / RESULTS_TEXT_FILE).write_text(
        "\n".join(
            [
                "# Answers to easy-VQA's test questions",
                "",
                "Exact match of the lower-case answer, greedy. Wrong image: the same model and questions, another test "
                "image. Question alone: each question's most frequent answer in training. Majority answer: the type's.",
                "",
                *lines,
                "",
            ]
        )
    )
    problems = shortfalls(rows, must_see=must_see)
    results = {**about, "rows": [asdict(row) for row in rows], "met": not problems}
    write_json(out / RESULTS_FILE, {**results, "shortfalls": problems})
    return lines


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and return the exit code."""
    arguments = _parse(argv)
    started = time.monotonic()
    records = official_test_questions(arguments.easy_vqa, num_images=arguments.images)
    answered = ask(
        arguments.model, records, easy_vqa=arguments.easy_vqa, batch_size=arguments.batch_size
    )
    guesses = Guesses(training_pairs(arguments.easy_vqa), types=TYPE_OF_ANSWER)
    seconds = time.monotonic() - started
    about: dict[str, object] = {
        "num_images": len({one.image for one in answered}),
        "wrong_image_seed": WRONG_IMAGE_SEED,
        "seconds": round(seconds, 1),
    }
    lines = write_results(
        answered, arguments.out, guesses=guesses, about=about, must_see=arguments.must_see
    )
    print("\n".join(lines))
    print(f"wrote 2 x {len(answered):,} answers ({seconds:.0f} s) and results to {arguments.out}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.evaluation.easy_vqa",
        description="Ask a released model easy-VQA's test questions with the right and with a wrong image.",
        epilog="example: python -m megatron_eve.evaluation.easy_vqa runs/demo/hf runs/demo/data/easy-vqa runs/demo",
    )
    parser.add_argument("model", type=Path, help="released Hugging Face folder")
    parser.add_argument("easy_vqa", type=Path, help="folder of `megatron-eve data demo easy-vqa`")
    parser.add_argument("out", type=Path, help="folder for the results; those in it are replaced")
    parser.add_argument("--images", type=int, metavar="N", help="the first N only; default: all")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, help=f"questions (default {BATCH_SIZE})"
    )
    parser.add_argument(
        "--must-see",
        nargs="+",
        choices=tuple(GROUPS),
        default=MUST_SEE,
        metavar="TYPE",
        help=f"types of question on which the verdict rests; default: {', '.join(MUST_SEE)}",
    )
    return parser.parse_args(argv)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is missing; make it with `megatron-eve data demo easy-vqa`.")
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    end_with(main)
