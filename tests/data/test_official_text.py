# SPDX-License-Identifier: Apache-2.0
"""Random conversations: what the official preprocessing trains on, we train on with equal ids and labels, or refuse by
choice; what it masks whole, we refuse, or keep because labels follow segments here."""

import random
from collections import Counter

import pytest

from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Turn
from tests.support.official_text import ANSWER_MARK, official_sample

PIECES = (
    *("What", " is", " it", "?", ".", "\n", " ", "  ", "", "", "3", "é", "你", "<b>", "USER:"),
    *("<|box_start|>", "<|im_start|>", "<tool_call>", "<|quad_end|>"),
)
RARE = ("<|im_end|>", "<|endoftext|>", ANSWER_MARK)
CHOSEN = {
    "image_without_mark": "the picture is dropped there, its question trained as text",
    "more_marks_than_images": "marks are merged, or are text where there is no image",
    "mark_in_answer": "a picture of the next sample, or text",
    "cut_image": "the picture is dropped",
    "empty_answer": "blank answers alone",
    "special_text": "trained by plain, and where the cut leaves it out",
    "unanswered_turn": "trained where the cut leaves it out",
    "no_answer": "plain trains the second turn, whoever says it",
    "empty_question": "trained where the cut leaves it out",
}
"""Reasons for which a sample may be refused that trains there; docs/migration.md names them."""


def conversation(rng: random.Random, *, has_image: bool) -> list[tuple[str, str]]:
    turns = [("gpt", "Hello.")] if rng.random() < 0.1 else []
    for number in range(rng.randint(1, 3)):
        for role in ("human", "gpt"):
            text = "".join(rng.choices(PIECES, k=rng.randint(0, 5)))
            if role == "human" and has_image and (number == 0 or rng.random() < 0.1):
                text = rng.choice(("<image>", "<image>\n", " <image> ", "")) + text
            if rng.random() < 0.04:
                text += rng.choice(RARE)
            turns.append((role, text))
    return turns[:-1] if rng.random() < 0.05 else turns


@pytest.mark.parametrize("template", ["qwen2", "plain"])
@pytest.mark.parametrize("has_image", [True, False])
def test_ids_and_labels_are_the_official_ones(
    qwen: Tokenizer, template: TemplateName, has_image: bool
) -> None:
    rng = random.Random(f"{template} {has_image}")
    counts: Counter[str] = Counter()
    for _ in range(1500):
        turns = conversation(rng, has_image=has_image)
        turns = turns[-2:] if template == "plain" else turns
        limit = rng.choice((30, 40, 50, 4096)) if template == "qwen2" else rng.choice((3, 4096))
        official = official_sample(
            turns,
            has_image=has_image,
            template=template,
            encode=qwen.encode,
            pad_id=qwen.pad_id,
            max_length=limit,
        )
        reason, ours = None, None
        try:
            ours = encode_sample(
                [Turn(role, text) for role, text in turns],
                num_images=int(has_image),
                template=template,
                tokenizer=qwen,
                max_text_tokens=limit,
            )
        except SampleError as error:
            reason = error.reason
        if ours is None:
            assert official is None or reason in CHOSEN, (turns, limit, reason)
            counts["refused by both" if official is None else "refused by choice"] += 1
            continue
        if official is None:
            assert any(ANSWER_MARK in text for _, text in turns), (turns, limit)
            counts["trained here alone"] += 1
            continue
        if any(ANSWER_MARK in text for _, text in turns):
            continue  # there the cut may hide that labels are wrong
        assert (ours.ids.tolist(), ours.labels.tolist()) == official, (turns, limit)
        counts["equal"] += 1
    assert counts["equal"] > 300, counts
    assert counts["refused by both"] > 0, counts
