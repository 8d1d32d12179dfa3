# SPDX-License-Identifier: Apache-2.0
"""easy-VQA and the demo: right answers, what they are compared with, and what is written about them."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_eve.evaluation.easy_vqa import TYPE_OF_ANSWER, write_results
from megatron_eve.evaluation.scoring import (
    OPEN,
    Answered,
    Guesses,
    normalised,
    score,
    shortfalls,
    table,
    verdict,
    wrong_images,
)
from tools.demo.first_images import first_images
from tools.demo.samples import choose, markdown
from tools.demo.text_loss import problems, report

TRAINING = [
    ("what shape is present?", "circle"),
    ("what shape is present?", "circle"),
    ("what shape is present?", "triangle"),
    ("what color is the shape?", "red"),
    ("is there a circle?", "no"),
    ("is there a circle?", "yes"),
    ("is there a circle?", "yes"),
    ("is there no circle?", "no"),
]
GUESSES = Guesses(TRAINING, types=TYPE_OF_ANSWER)


def answered(question: str, expected: str, answer: str, with_wrong: str) -> Answered:
    return Answered(
        id="0",
        image="a.png",
        wrong_image="b.png",
        question=question,
        type=TYPE_OF_ANSWER[expected],
        expected=expected,
        answer=answer,
        answer_wrong_image=with_wrong,
    )


def seeing(*, num_right: int, num_right_with_wrong: int) -> list[Answered]:
    """Ten shape and ten colour questions that the guess never gets right."""
    shapes = [("what shape is present?", "rectangle"), ("what color is the shape?", "blue")]
    return [
        answered(
            question,
            expected,
            expected if n < num_right else "?",
            expected if n < num_right_with_wrong else "?",
        )
        for question, expected in shapes
        for n in range(10)
    ]


def test_wrong_images_are_other_images() -> None:
    images = [f"{n}.png" for n in range(1000)]
    found = wrong_images(images, seed=42)
    assert set(found) == set(images) == set(found.values())
    assert all(image != other for image, other in found.items())
    assert found == wrong_images(images[::-1], seed=42) != wrong_images(images, seed=43)
    assert wrong_images(["a", "b", "a"], seed=0) == {"a": "b", "b": "a"}
    with pytest.raises(ValueError, match="give at least 2"):
        wrong_images(["a", "a"], seed=0)


def test_guess_is_the_most_frequent_training_answer() -> None:
    assert GUESSES.from_question("what shape is present?", kind="shape") == "circle"
    assert GUESSES.from_question("is there no circle?", kind="yes/no") == "no"
    assert GUESSES.from_question("never asked?", kind="color") == "red"
    assert GUESSES.from_type("yes/no") == "no"  # two of each: the first in the alphabet
    assert GUESSES.from_type("size") == ""


def test_scores_by_type() -> None:
    rows = score(
        [
            answered("what shape is present?", "circle", " Circle\n", "triangle"),
            answered("what shape is present?", "triangle", "circle", "triangle"),
            answered("what color is the shape?", "blue", "blue", "red"),
            answered("is there a circle?", "yes", "yes", "no"),
            answered("is there no circle?", "no", "yes.", "no"),
        ],
        guesses=GUESSES,
    )
    found = {
        row.name: (
            row.num_questions,
            row.right_image,
            row.wrong_image,
            row.question_alone,
            row.majority,
        )
        for row in rows
    }
    assert found == {
        "shape": (2, 0.5, 0.5, 0.5, 0.5),
        "color": (1, 1.0, 0.0, 0.0, 0.0),
        OPEN: (3, 2 / 3, 1 / 3, 1 / 3, 1 / 3),
        "yes/no": (2, 0.5, 0.5, 1.0, 0.5),
    }
    assert normalised(" Red ") == "red"


def test_a_model_that_sees_passes() -> None:
    rows = score(seeing(num_right=8, num_right_with_wrong=0), guesses=GUESSES)
    assert shortfalls(rows) == []
    assert verdict(rows).startswith("MET: the model sees. shape 80.0% with the right image")
    assert "open (shape and color) 80.0% with the right image (at least 80%)" in verdict(rows)


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "message"),
    [
        (7, 0, "shape: 70.0% with the right image, expected at least 80%"),
        (10, 1, "color: 10.0% with a wrong image, expected at most 5.0%"),
    ],
)
def test_a_model_that_does_not_see_is_named(num_right: int, num_wrong: int, message: str) -> None:
    asked = seeing(num_right=num_right, num_right_with_wrong=num_wrong)
    rows = score(asked, guesses=GUESSES)
    assert message in verdict(rows)
    assert verdict(rows).startswith("NOT MET")
    assert len(shortfalls(rows)) == 3
    assert "no color questions were asked" in shortfalls(score(asked[:10], guesses=GUESSES))


def test_a_demonstration_may_rest_on_one_type() -> None:
    asked = seeing(num_right=10, num_right_with_wrong=0)
    blind_to_shapes = [
        dataclasses.replace(one, answer="pear") if one.type == "shape" else one for one in asked
    ]
    rows = score(blind_to_shapes, guesses=GUESSES)
    assert shortfalls(rows)
    assert shortfalls(rows, must_see=("color",)) == []
    assert verdict(rows, must_see=("color",)) == (
        "MET: the model sees. color 100.0% with the right image (at least 80%), 0.0% with a wrong one (at most 5.0%)."
    )


def test_table_text() -> None:
    rows = score(seeing(num_right=9, num_right_with_wrong=0)[:10], guesses=GUESSES)
    assert table(rows) == [
        "| questions              | number | right image | wrong image | question alone | majority answer |",
        "| ---------------------- | -----: | ----------: | ----------: | -------------: | --------------: |",
        "| shape                  |     10 |       90.0% |        0.0% |           0.0% |            0.0% |",
        "| open (shape and color) |     10 |       90.0% |        0.0% |           0.0% |            0.0% |",
    ]


def test_results_and_samples_are_written(tmp_path: Path) -> None:
    asked = seeing(num_right=9, num_right_with_wrong=0)
    write_results(asked, tmp_path, guesses=GUESSES, about={"seconds": 1.0})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["met"] is True
    assert results["rows"][0]["right_image"] == 0.9
    assert "MET: the model sees" in (tmp_path / "results.md").read_text()
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [Answered(**json.loads(line)) for line in lines] == asked
    chosen = choose(asked, num_images=12)
    assert [one.type for one in chosen["a.png"]] == ["shape", "color"]
    text = markdown(chosen, easy_vqa=tmp_path, folder=tmp_path)
    assert "| [a.png](a.png) | what color is the shape? | blue | blue | ? |" in text.splitlines()


def test_first_images(tmp_path: Path) -> None:
    entries = [{"id": n, "image": f"{n // 2}.png"} for n in range(6)]
    (tmp_path / "all.json").write_text(json.dumps(entries))
    assert first_images(tmp_path / "all.json", tmp_path / "few" / "first.json", num_images=2) == 4
    assert json.loads((tmp_path / "few" / "first.json").read_text()) == entries[:4]


def test_text_loss_must_keep_every_bit() -> None:
    losses = {"llm": [2.0, 3.0], "imported": [2.00001, 3.0], "stage3": [9.0, 9.0]}
    losses["stage2_1"] = list(losses["imported"])
    assert problems(losses) == []
    assert report(losses)[-1] == "MET: stage 2.1 left every bit of the text loss."
    losses["stage2_1"][1] += 5e-16
    assert "the loss of passages [2] changed" in report(losses)[-1]
    losses["imported"][0] = 2.001
    assert "import: a passage's loss moved by 0.001" in problems(losses)[0]
