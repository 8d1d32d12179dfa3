# SPDX-License-Identifier: Apache-2.0
"""Batched answers: equal to asking one by one, whatever is shared, sorted or padded on the way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.errors import CheckpointError, DataError
from megatron_eve.inference.answers import (
    AnswerOptions,
    Question,
    ReleasedModel,
    _prompts,
    answer_questions,
    iter_answers,
    load_released,
    shared_prefix,
)

OPTIONS = AnswerOptions(template="qwen2", resize_rule="train", max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def released(released_folder: Path) -> ReleasedModel:
    return load_released(released_folder, device="cpu")


def questions(pictures: list[Path]) -> list[Question]:
    texts = (
        "What colour is the circle?",
        "How many?",
        "red",
        "Is it a blue square above a circle?",
    )
    asked = [Question(text=t, images=(p,)) for t in texts for p in pictures]
    asked.append(Question(text="Which?", images=(pictures[0], pictures[2])))
    asked.append(Question(text="How many shapes?", images=()))
    return asked


@torch.inference_mode()
def one_by_one(released: ReleasedModel, asked: list[Question]) -> list[str]:
    """The plain way: one prompt at a time, no shared prefix."""
    answers = []
    for question in asked:
        prompt = released.processor.prompt(question.text, num_images=len(question.images))
        images = [Image.open(path) for path in question.images]
        inputs = released.processor(text=prompt, images=images)
        output = released.model.generate(**inputs, max_new_tokens=6)
        length = inputs["input_ids"].shape[1]
        answers += released.processor.answers(output, prompt_length=length)
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_answer_as_single_prompts(
    batch_size: int, released: ReleasedModel, pictures: list[Path]
) -> None:
    asked = questions(pictures)
    options = replace(OPTIONS, batch_size=batch_size)
    found = answer_questions(released, asked, options=options)
    assert found == one_by_one(released, asked)
    assert len(set(found)) > 4


def test_answers_come_batch_by_batch(released: ReleasedModel, pictures: list[Path]) -> None:
    asked = questions(pictures)
    pairs = list(iter_answers(released, asked, options=OPTIONS))
    assert sorted(index for index, _ in pairs) == list(range(len(asked)))
    assert [a for _, a in sorted(pairs)] == answer_questions(released, asked, options=OPTIONS)
    assert answer_questions(released, [], options=OPTIONS) == []


def test_captions_end_at_the_newline(released: ReleasedModel, pictures: list[Path]) -> None:
    """Template plain: the prompt is the image alone, so there is nothing to share."""
    asked = [Question(text="", images=(path,)) for path in pictures]
    options = replace(OPTIONS, template="plain", max_new_tokens=40)
    captions = answer_questions(released, asked, options=options)
    assert len(set(captions)) > 1
    assert not any("\n" in caption for caption in captions)


def test_resize_rule_is_used(released: ReleasedModel, pictures: list[Path]) -> None:
    """The first picture is 8 x 8; the rule `eval` enlarges it to 16 x 16."""
    asked = [Question(text="What?", images=(pictures[0],))]
    lengths = []
    for rule in ("train", "eval"):
        options = replace(OPTIONS, resize_rule=rule)
        lengths.append(len(_prompts(released.processor, asked, options=options)[0].ids))
    assert lengths[1] - lengths[0] == (4 * 4 + 4 + 1) - (2 * 2 + 2 + 1)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (["1 2 3 4", "1 2 5 6"], 2),
        (["1 2 3", "1 2 3"], 2),
        (["1 2", "1 2 3"], 1),
        (["5 1", "6 1"], 0),
        (["1 -2 3", "1 -2 3"], 1),
        (["-1 2"], 0),
    ],
)
def test_shared_prefix(prompts: list[str], expected: int) -> None:
    """Negative: a vision token, which is never shared. Every prompt keeps its last token."""
    ids = [np.array([int(word) for word in prompt.split()]) for prompt in prompts]
    assert shared_prefix([(abs(row), (row < 0).astype(int)) for row in ids]) == expected


def test_bad_input_is_named(released: ReleasedModel, pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    for path in (broken, tmp_path / "none.png"):
        asked = [Question(text="What?", images=(path,))]
        with pytest.raises(DataError, match=f"{path.name} cannot be read as an image"):
            answer_questions(released, asked, options=OPTIONS)
    with pytest.raises(CheckpointError, match=r"no released folder: config.json not found"):
        load_released(tmp_path)
