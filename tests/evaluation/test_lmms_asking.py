# SPDX-License-Identifier: Apache-2.0
"""What the lmms-eval plugin asks a released folder, without lmms-eval: batches, marks, rules, penalty, likelihoods."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.tokenizer import train_bpe
from megatron_eve.errors import CheckpointError, ConfigError
from megatron_eve.evaluation.lmms_eval.asking import (
    Asked,
    AskSettings,
    Decoding,
    ReleasedFolder,
    cut,
)
from tests.checkpoints_convert.conftest import CORPUS, release_model, write_reference_release
from tests.support.reference_eve import build_reference
from tests.support.tiny import ALL

SHORT = Decoding(max_new_tokens=6)


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def asked(text: str, *images: Image.Image) -> Asked:
    return Asked(text=text, load_images=lambda: images)


QUESTIONS = [
    asked("What colour is the circle?", picture(8, 8, 0)),
    asked("How many?"),
    asked("Which? red green", picture(16, 4, 1), picture(5, 11, 2)),
    asked("Is it <image> or <image>?", picture(4, 4, 3), picture(8, 4, 4)),
    asked("", picture(12, 12, 5)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("asking")
    train_bpe(CORPUS * 3, base / "bpe", 320)
    eve = build_reference(release_model(ALL, base / "bpe"), seed=4)
    return write_reference_release(base / "eve", eve, base / "bpe")


@pytest.fixture(scope="module")
def released(folder: Path) -> ReleasedFolder:
    return ReleasedFolder(folder, AskSettings(resize_rule="train"), device="cpu")


def settled(released: ReleasedFolder, **changes: object) -> ReleasedFolder:
    """The same model, asked otherwise."""
    other = ReleasedFolder.__new__(ReleasedFolder)
    other.__dict__ |= released.__dict__ | {"settings": replace(released.settings, **changes)}  # type: ignore[arg-type]
    return other


def one_by_one(released: ReleasedFolder, decoding: Decoding = SHORT) -> list[str]:
    return [next(iter(released.answers([one], decoding)))[1] for one in QUESTIONS]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_answer_as_single_questions(released: ReleasedFolder, batch_size: int) -> None:
    found = dict(settled(released, batch_size=batch_size).answers(QUESTIONS, SHORT))
    assert [found[index] for index in range(len(QUESTIONS))] == one_by_one(released)
    assert len(set(found.values())) > 2


def test_images_go_where_their_marks_are(released: ReleasedFolder) -> None:
    assert released.prompt("Is <image> it <image>?", num_images=2).endswith(
        "USER: Is <image> it <image>? ASSISTANT:"
    )
    for question in ("Is it?", "Is <image>it?"):  # no mark, or not one for each
        found = released.prompt(question, num_images=2)
        assert found.endswith("USER: <image>\n<image>\nIs it? ASSISTANT:")
    assert released.prompt("Is it?", num_images=0).endswith("USER: Is it? ASSISTANT:")
    assert settled(released, template="plain").prompt("anything", num_images=1) == "<image>"


def test_resize_rule_is_the_processors(released: ReleasedFolder) -> None:
    question = asked("red?", picture(8, 8, 0))
    lengths = {
        rule: len(settled(released, resize_rule=rule).prepared(question).patches)
        for rule in ("train", "eval")
    }
    assert lengths == {"train": 2 * 2, "eval": 4 * 4}


@torch.no_grad()
def test_repetition_penalty_counts_what_the_official_code_counts(released: ReleasedFolder) -> None:
    """Ids of the prompt with 0 at the image, and what was generated, as transformers penalises them."""
    penalty = 1.3  # strong enough to change answers of this model
    question = QUESTIONS[0]
    prompt = released.prepared(question)
    batch = released.processor.collate([prompt])
    seen = set(np.where(prompt.kinds == 0, prompt.ids, 0).tolist())
    ids, new = batch["input_ids"], []
    for _ in range(6):
        kinds = torch.nn.functional.pad(batch["token_kinds"], (0, len(new)))
        logits = released.model(
            ids, token_kinds=kinds, pixel_values=batch["pixel_values"], use_cache=False
        ).logits[0, -1]
        for token in seen:
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        new.append(int(logits.argmax()))
        seen.add(new[-1])
        ids = torch.cat((ids, ids.new_tensor([[new[-1]]])), dim=1)
        if new[-1] == released.model.generation_config.eos_token_id:
            break
    expected = released.processor.answers(torch.tensor([new]), prompt_length=0)[0]
    penalised = settled(released, repetition_penalty=penalty)
    assert next(iter(penalised.answers([question], SHORT)))[1] == expected
    assert one_by_one(penalised) != one_by_one(released)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 5])
def test_likelihoods_are_those_of_the_logits(released: ReleasedFolder, batch_size: int) -> None:
    texts = ["red", " a blue square", "two", "green circle", "four shapes above"]
    found = dict(settled(released, batch_size=batch_size).likelihoods(QUESTIONS, texts))
    for index, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True)):
        images = list(question.load_images())
        prompt = released.prompt(question.text, num_images=len(images))
        inputs = released.processor(text=f"{prompt} {text.strip()}", images=images)
        start = released.processor(text=prompt, images=images)["input_ids"].shape[1]
        ids = inputs["input_ids"][0, start:]
        logits = released.model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
        expected = float(logits.gather(1, ids[:, None]).sum())
        assert found[index].log_probability == pytest.approx(expected, rel=1e-5)
        assert found[index].is_greedy == bool((logits.argmax(-1) == ids).all())


def test_greedy_answer_is_known_as_greedy(released: ReleasedFolder) -> None:
    """Where the greedy answer is a text that is tokenised as it was generated."""
    prompt = released.prepared(QUESTIONS[1])
    batch = released.processor.collate([prompt])
    with torch.no_grad():
        token = released.model(**batch).logits[0, -1].argmax()
    answer = released.processor.tokenizer.decode(token)
    (_, greedy), (_, other) = (
        next(iter(released.likelihoods([QUESTIONS[1]], [text]))) for text in (answer, "zzz")
    )
    tokens = released.processor.tokenizer(f" {answer.strip()}")["input_ids"]
    assert greedy.is_greedy == (tokens == [int(token)])
    assert not other.is_greedy
    assert other.log_probability < 0


def test_answer_ends_before_a_stop_text(released: ReleasedFolder) -> None:
    assert cut("a circle\n\nQ: next", ("\n\n", "Q:")) == "a circle"
    assert cut("a circle", ("", "square")) == "a circle"
    whole = one_by_one(released)
    letter = next(text for text in whole if len(text) > 2)[1]
    assert one_by_one(released, replace(SHORT, until=(letter,))) == [
        text.split(letter)[0].strip() for text in whole
    ]


def test_caption_is_one_line(released: ReleasedFolder) -> None:
    captions = settled(released, template="plain")
    (_, caption), *_ = captions.answers([QUESTIONS[0]], Decoding(max_new_tokens=8))
    assert "\n" not in caption


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resize_rule=square is unknown; use train or eval"):
        AskSettings(resize_rule="square")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="template=llama is unknown; use qwen2 or plain"):
        AskSettings(template="llama")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="repetition_penalty=0 must be above 0"):
        AskSettings(repetition_penalty=0)
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        AskSettings(batch_size=0)
    with pytest.raises(CheckpointError, match=r"no released folder: modeling_eve\.py not found"):
        ReleasedFolder(tmp_path, AskSettings(), device="cpu")
