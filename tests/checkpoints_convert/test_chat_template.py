# SPDX-License-Identifier: Apache-2.0
"""`apply_chat_template` of a release writes the conversations of training, not those of the language model before."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

from checkpoints_convert.automodel_layout import Release, write_release
from checkpoints_convert.official_layout import write_official
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import RunConfig
from tests.checkpoints_convert.conftest import release_model
from tests.checkpoints_convert.test_release import picture
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import DENSE

reads_images = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 49),
    reason="apply_chat_template of older versions returns text only",
)
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def said(role: str, text: str, *images: object) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


TURNS = [("What colour is the circle?", "red"), ("How many?", None)]


def conversation(*images: object) -> list[dict[str, Any]]:
    """TURNS as messages."""
    return [
        said("user", " What colour is the circle? ", *images),
        said("assistant", "red"),
        said("user", "How many?"),
    ]


@pytest.fixture(scope="module")
def processor(full_release: tuple[Path, ReferenceEve]) -> Any:
    return AutoProcessor.from_pretrained(full_release[0], trust_remote_code=True)


def test_a_conversation_is_that_of_training(processor: Any) -> None:
    messages = conversation(None, None)
    text = processor.conversation(TURNS, num_images=2)
    assert processor.apply_chat_template(messages) == text
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == text


@reads_images
def test_a_conversation_becomes_the_models_input(processor: Any) -> None:
    first, second = picture(8, 8), picture(12, 4, seed=1)
    messages = conversation(first, second)
    text = processor.conversation(TURNS, num_images=2)
    expected = processor(text=text, images=[first, second])
    found = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@reads_images
def test_the_pipeline_answers_as_chat_does(
    full_release: tuple[Path, ReferenceEve], processor: Any
) -> None:
    folder, image = full_release[0], picture(8, 8)
    asked = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True, device="cpu")
    (reply,) = asked(text=[said("user", "What colour?", image)], max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    answer, _ = model.chat(processor, "What colour?", images=image, max_new_tokens=6)
    assert reply["generated_text"][-1]["content"].strip() == answer


@reads_images
def test_a_batch_with_and_without_images(processor: Any) -> None:
    image = picture(8, 8)
    one, other = said("user", "What colour?", image), said("user", "How many?")
    found = processor.apply_chat_template([[one], [other]], tokenize=True, return_dict=True)
    texts = [processor.prompt("What colour?"), processor.prompt("How many?", num_images=0)]
    expected = processor(text=texts, images=[[image], []])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_texts_and_what_a_caller_says_as_system(processor: Any) -> None:
    """As the server does: the template has one system text, the one of training."""
    messages = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What colour?"},
    ]
    tokenizer = processor.tokenizer
    text = processor.prompt("Answer in one word.\nWhat colour?", num_images=0)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer.apply_chat_template(messages[1:], tokenize=False) == processor.prompt(
        "What colour?", num_images=0
    )


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([said("assistant", "red")], "Message 0 is from assistant, expected user"),
        ([said("user", "a"), said("user", "b")], "Message 1 is from user, expected assistant"),
        ([said("user", "a"), said("system", "b")], "Message 1 is from system, expected assistant"),
        ([said("user", "a"), said("assistant", "b", picture(8, 8))], "type image from assistant"),
        ([{"role": "user", "content": [{"type": "video"}]}], "type video from user"),
    ],
)
def test_misuse_is_refused(processor: Any, messages: list[Any], problem: str) -> None:
    with pytest.raises(Exception, match=problem):  # of the template engine below transformers
        processor.tokenizer.apply_chat_template(messages, tokenize=False)


def test_videos_are_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="text and images only"):
        processor(text="what?", videos=[[picture(8, 8)]])


@pytest.mark.parametrize("layout", ["automodel", "official"])
@pytest.mark.parametrize("template", ["qwen2", "plain", None])
def test_the_language_models_own_template_is_not_inherited(
    layout: str, template: str | None, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """`plain` models, of the first stages, continue an image with a caption and hold no conversation."""
    tokenizer = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHATML}))
    eve = build_reference(release_model(DENSE, tokenizer))
    release = Release(
        model=eve.config, dtype="float32", tokenizer=tokenizer, image_edge=16, origin="tests",
        run=run_with(template),
    )  # fmt: skip
    write = write_release if layout == "automodel" else write_official
    write(tmp_path / "eve", release, eve.state_dict().items())
    found = AutoTokenizer.from_pretrained(tmp_path / "eve", trust_remote_code=True).chat_template
    if template == "plain":
        assert found is None
    else:
        assert "USER: " in found
        assert "<|im_start|>" not in found


def run_with(template: str | None) -> RunConfig | None:
    if template is None:
        return None
    run = load_recipe("eve_tiny_stage3")
    return dataclasses.replace(run, data=dataclasses.replace(run.data, template=template))  # type: ignore[arg-type]


def test_what_a_template_is_given_and_does_not_write_is_refused(processor: Any) -> None:
    tokenizer, messages = processor.tokenizer, conversation()
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert asked == tokenizer.apply_chat_template(messages, tokenize=False)
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    for options, problem in (
        ({"tools": [tool]}, "tools and documents are not supported"),
        ({"documents": [{"title": "a", "text": "b"}]}, "tools and documents are not supported"),
    ):
        with pytest.raises(Exception, match=problem):  # of the template engine below transformers
            tokenizer.apply_chat_template(messages, tokenize=False, **options)
    answered = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert answered.endswith(" red<|im_end|>")
    with pytest.raises(Exception, match="no question at the end: there is nothing to answer"):
        tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
