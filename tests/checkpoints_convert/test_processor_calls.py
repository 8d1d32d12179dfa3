# SPDX-License-Identifier: Apache-2.0
"""The released processor in the words of other processors: padding, truncation, images in several forms. Each keyword
does what its name says or is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from checkpoints_convert.automodel_layout import Release, write_release
from checkpoints_convert.hf.processing_eve import EVEProcessor
from tests.checkpoints_convert.conftest import release_model
from tests.checkpoints_convert.test_chat_template import run_with
from tests.checkpoints_convert.test_release import picture
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import DENSE

FullRelease = tuple[Path, ReferenceEve]
TEXTS = ["<image>\nWhich colour has the square?", "How many?", "<image>\nred? <image>"]
IMAGES = [[picture(8, 8)], [], [picture(12, 4, seed=1), picture(4, 4, seed=2)]]


@pytest.fixture(scope="module")
def processor(full_release: FullRelease) -> EVEProcessor:
    return AutoProcessor.from_pretrained(full_release[0], trust_remote_code=True)


@pytest.fixture(scope="module")
def model(full_release: FullRelease) -> Any:
    return AutoModelForCausalLM.from_pretrained(full_release[0], trust_remote_code=True).eval()


def rows(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and kinds of each prompt without padding."""
    found = []
    for ids, mask, kinds in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["token_kinds"], strict=True
    ):
        found.append((ids[mask].tolist(), kinds[mask].tolist()))
    return found


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_of_its_prompts(
    side: str, processor: EVEProcessor, model: Any
) -> None:
    batch = processor(
        text=TEXTS, images=IMAGES, padding=True, padding_side=side, return_tensors="pt"
    )
    mask = batch["attention_mask"].bool()
    edge = mask[:, -1] if side == "left" else mask[:, 0]
    assert edge.all() and not mask.all()
    assert (batch["input_ids"][~mask] == processor.tokenizer.pad_token_id).all()
    logits = model(**batch).logits
    for row, (text, images) in enumerate(zip(TEXTS, IMAGES, strict=True)):
        alone = model(**processor(text=text, images=images)).logits[0]
        torch.testing.assert_close(logits[row, mask[row]], alone, rtol=1e-5, atol=1e-5)


def test_a_padded_batch_is_answered_as_its_prompts(processor: EVEProcessor, model: Any) -> None:
    def answers(text: Any, images: Any) -> list[str]:
        inputs = processor(text=text, images=images, padding="longest", pad_to_multiple_of=16)
        output = model.generate(**inputs, max_new_tokens=6)
        return processor.answers(output, prompt_length=inputs["input_ids"].shape[1])

    together = answers(TEXTS, IMAGES)
    assert together == [answers([t], [i])[0] for t, i in zip(TEXTS, IMAGES, strict=True)]


def test_the_tokenizers_side_is_the_processors(
    processor: EVEProcessor, full_release: FullRelease
) -> None:
    """A release pads on the left in both; who changes the tokenizer's changes the processor's."""
    tokenizer = AutoTokenizer.from_pretrained(full_release[0], trust_remote_code=True)
    assert tokenizer.padding_side == processor.tokenizer.padding_side == "left"
    assert not processor(text=TEXTS[:2], images=IMAGES[:2])["attention_mask"][1, 0]
    try:
        processor.tokenizer.padding_side = "right"
        assert not processor(text=TEXTS[:2], images=IMAGES[:2])["attention_mask"][1, -1]
    finally:
        processor.tokenizer.padding_side = "left"


def test_lengths(processor: EVEProcessor) -> None:
    plain = processor(text=TEXTS, images=IMAGES)
    longest = plain["input_ids"].shape[1]
    multiple = processor(text=TEXTS, images=IMAGES, pad_to_multiple_of=64)
    assert multiple["input_ids"].shape[1] == -(-longest // 64) * 64
    given = processor(text=TEXTS, images=IMAGES, padding="max_length", max_length=200)
    assert given["input_ids"].shape[1] == 200
    default = processor(text=TEXTS, images=IMAGES, padding="max_length")
    assert default["input_ids"].shape[1] == processor.tokenizer.model_max_length
    assert rows(plain) == rows(multiple) == rows(given) == rows(default)
    single = processor(text=TEXTS[0], images=IMAGES[0], padding=False)
    assert rows(single) == rows(plain)[:1]


def test_truncation_cuts_text_and_never_an_image(processor: EVEProcessor) -> None:
    whole = rows(processor(text=TEXTS[0], images=IMAGES[0]))[0]
    num_image = sum(kind != 0 for kind in whole[1])
    limit = num_image + 3
    cut = processor(text=TEXTS[0], images=IMAGES[0], truncation=True, max_length=limit)
    assert rows(cut) == [(whole[0][:limit], whole[1][:limit])]
    uncut = processor(text=TEXTS[0], images=IMAGES[0], truncation=True)
    assert rows(uncut) == [whole]
    with pytest.raises(ValueError, match=rf"Prompt 0 .* to {num_image - 1} would cut an image"):
        processor(text=TEXTS[0], images=IMAGES[0], truncation=True, max_length=num_image - 1)
    try:
        processor.tokenizer.truncation_side = "left"
        with pytest.raises(ValueError, match="would cut an image"):
            processor(text=TEXTS[0], images=IMAGES[0], truncation=True, max_length=limit)
    finally:
        processor.tokenizer.truncation_side = "right"


def test_images_in_several_forms(processor: EVEProcessor) -> None:
    image = picture(12, 8)
    array = np.asarray(image)
    expected = processor(text="<image>", images=image)
    forms = [
        [image], [[image]], array, [array], array[None], array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()), torch.from_numpy(array.transpose(2, 0, 1).copy()),
        np.dstack((array, np.full((8, 12), 7, np.uint8))),
    ]  # fmt: skip
    for form in forms:
        found = processor(text="<image>", images=form)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    grey = processor(text="<image>", images=array[..., 0])
    listed = processor(text="<image>", images=Image.fromarray(array[..., 0]).convert("RGB"))
    assert torch.equal(grey["pixel_values"], listed["pixel_values"])
    assert "pixel_values" not in processor(text=["a", "b"], images=None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_length": 5}, "max_length=5 does nothing by itself"),
        ({"padding": "long"}, "padding='long' is unknown"),
        ({"padding": False}, "prompts have .* tokens, and a batch is one tensor"),
        ({"padding": "max_length", "max_length": 9}, "more than max_length=9"),
        ({"padding_side": "both"}, "padding_side='both' is unknown"),
        ({"truncation": "only_second"}, "truncation='only_second' is unknown"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
        ({"return_tensors": "tf"}, "return_tensors='tf' is not supported"),
        ({"return_tensors": None}, "return_tensors=None is not supported"),
        ({"add_special_tokens": True}, "add_special_tokens=True is not supported"),
        ({"text": None}, "text is NoneType, expected a text or a list"),
        ({"text": [["a", "b"]]}, r"text is a list of list, expected"),
        ({"text": picture(4, 4), "images": "a"}, "text is Image, expected"),
        ({"images": np.zeros((8, 8, 3), np.float32)}, "array of float32; give a PIL image, or uint8"),
        ({"images": np.zeros((3, 8, 3), np.uint8)}, r"shape \[3, 8, 3\], of which neither or both"),
        ({"images": np.zeros((8,), np.uint8)}, r"shape \[8\]; give a PIL image"),
        ({"pading": True}, "'pading'"),
        ({"return_mm_token_type_ids": True}, "'return_mm_token_type_ids'"),
    ],
)  # fmt: skip
def test_misuse_is_refused_by_name(
    options: dict[str, Any], problem: str, processor: EVEProcessor
) -> None:
    given: dict[str, Any] = {"text": TEXTS, "images": IMAGES}
    if "images" in options and "text" not in options:
        given = {"text": "<image>"}
    with pytest.raises((TypeError, ValueError), match=problem):
        processor(**(given | options))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"do_resize": True}, "do_resize=True is not computed here; leave it at False"),
        ({"do_normalize": False}, "do_normalize=False is not computed"),
        ({"resample": 2}, "resample=2 is not computed"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
        ({"size": {"height": 3}}, "EVEImageProcessor has no field size"),
        ({"max_sise": 9}, "EVEImageProcessor has no field max_sise"),
    ],
)
def test_fields_that_are_not_computed_are_refused(
    changed: dict[str, Any], problem: str, full_release: FullRelease, tmp_path: Path
) -> None:
    folder = shutil.copytree(full_release[0], tmp_path / "eve")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises((TypeError, ValueError), match=problem):
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)


def test_a_saved_processor_is_the_same(processor: EVEProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.template == "qwen2"
    first, second = (p(text=TEXTS, images=IMAGES) for p in (processor, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_of_captions_is_asked_for_captions(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Its release has no chat template: that, and not a keyword that is forgotten, decides."""
    eve = build_reference(release_model(DENSE, tokenizer_folder))
    release = Release(
        model=eve.config, dtype="float32", tokenizer=tokenizer_folder, image_edge=16,
        run=run_with("plain"), origin="tests",
    )  # fmt: skip
    write_release(tmp_path / "eve", release, eve.state_dict().items())
    processor = AutoProcessor.from_pretrained(tmp_path / "eve", trust_remote_code=True)
    assert processor.prompt("", num_images=2) == "<image><image>"
    with pytest.raises(ValueError, match="no place for a question"):
        processor.prompt("What?")
    for ask in (
        lambda: processor.prompt("What?", template="qwen2"),
        lambda: processor.conversation([("What?", None)]),
    ):
        with pytest.raises(ValueError, match=r"trained on captions alone \(template plain\)"):
            ask()
    written = processor.tokenizer("A red circle\nA chat", return_tensors="pt")["input_ids"]
    assert processor.answers(written, prompt_length=0) == ["A red circle"]
    assert processor.answers(written, prompt_length=0, template="qwen2") == ["A red circle\nA chat"]
