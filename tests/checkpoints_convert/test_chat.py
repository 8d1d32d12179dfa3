# SPDX-License-Identifier: Apache-2.0
"""`model.chat` of a released folder: one turn at a time what `generate` gives, with history and several images."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from tests.checkpoints_convert.test_release import picture
from tests.support.reference_eve import ReferenceEve

Released = tuple[Any, Any]


@pytest.fixture(scope="module")
def released(full_release: tuple[Path, ReferenceEve]) -> Released:
    folder = full_release[0]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), processor


def by_hand(released: Released, text: str, images: list[Image.Image], **options: Any) -> str:
    model, processor = released
    inputs = processor(text=text, images=images, **options)
    output = model.generate(**inputs, max_new_tokens=6)
    return processor.answers(output, prompt_length=inputs["input_ids"].shape[1])[0]


def test_turns_of_a_conversation(released: Released) -> None:
    model, processor = released
    images = [picture(8, 8), picture(12, 4, seed=1)]
    first, history = model.chat(
        processor, "What colour is the circle?", images=images, max_new_tokens=6
    )
    text = processor.prompt("What colour is the circle?", num_images=2)
    assert first == by_hand(released, text, images)
    assert history == [("What colour is the circle?", first)]

    second, longer = model.chat(
        processor, "How many?", images=images, history=history, max_new_tokens=6
    )
    text = processor.conversation([history[0], ("How many?", None)], num_images=2)
    assert second == by_hand(released, text, images)
    assert longer == [*history, ("How many?", second)]
    assert len(history) == 1  # the caller's own list is left alone
    assert first != second


def test_one_image_or_none(released: Released) -> None:
    model, processor = released
    alone, _ = model.chat(processor, "red?", images=picture(8, 8), max_new_tokens=6)
    listed, _ = model.chat(processor, "red?", images=[picture(8, 8)], max_new_tokens=6)
    assert alone == listed
    without, _ = model.chat(processor, "red?", max_new_tokens=6)
    assert without == by_hand(released, processor.prompt("red?", num_images=0), [])


@pytest.mark.parametrize("rule", ["train", "eval"])
def test_resize_rule_by_name(released: Released, rule: str) -> None:
    model, processor = released
    image = picture(8, 8, seed=3)
    found, _ = model.chat(processor, "red?", images=image, resize_rule=rule, max_new_tokens=6)
    text = processor.prompt("red?")
    assert found == by_hand(released, text, [image], resize_rule=rule)


def test_filler_of_images_is_never_generated(released: Released) -> None:
    """A repetition penalty counts the ids of the prompt; the end token must not be among them."""
    model, processor = released
    inputs = processor(text=processor.prompt("red?"), images=picture(8, 8))
    ids = inputs["input_ids"][inputs["token_kinds"] != 0].unique().tolist()
    assert ids == [processor.tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert not set(model.generation_config.eos_token_id) & set(
        inputs["input_ids"].flatten().tolist()
    )
