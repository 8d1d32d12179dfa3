# SPDX-License-Identifier: Apache-2.0
"""A released folder: loads offline through transformers' Auto classes, answers, and says no where it should."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
)

from checkpoints_convert.automodel_layout import CODE_FILES
from checkpoints_convert.hf.processing_eve import EVEProcessor, cut_patches, target_size
from checkpoints_convert.hf_folder import SafetensorsFolder
from checkpoints_convert.model_card import CardFacts, model_card
from megatron_eve.data.read.conversation import encode_prompt
from megatron_eve.data.read.tokenizer import load_tokenizer
from megatron_eve.data.sample import Turn
from megatron_eve.errors import CheckpointError, ConfigError
from tests.checkpoints_convert.conftest import release_model, write_reference_release
from tests.support.reference_eve import (
    IMAGE_PLACEHOLDER,
    ReferenceEve,
    ReferenceSample,
    build_reference,
)
from tests.support.tiny import ALL, DENSE, patch_rows

FullRelease = tuple[Path, ReferenceEve]


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def processor(full_release: FullRelease) -> EVEProcessor:
    return AutoProcessor.from_pretrained(full_release[0], trust_remote_code=True)


@pytest.fixture(scope="module")
def model(full_release: FullRelease):  # type: ignore[no-untyped-def]
    return AutoModelForCausalLM.from_pretrained(full_release[0], trust_remote_code=True)


def test_auto_classes_find_everything_in_the_folder(full_release: FullRelease) -> None:
    folder, eve = full_release
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.model_type, config.moe_part) == ("eve-qwen2", "layernorm-self_attn-mlp")
    assert config.mm_hidden_size == eve.config.patch_embed_dim
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.encode("red circle") == load_tokenizer(folder).encode("red circle")
    images = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert (type(images).__name__, images.max_size) == ("EVEImageProcessor", 16)


@torch.no_grad()
def test_folder_alone_gives_the_reference_logits(
    model, processor: EVEProcessor, full_release: FullRelease
) -> None:  # type: ignore[no-untyped-def]
    """Image file to logits through the processor, against the reference with pixels prepared by hand."""
    eve = full_release[1]
    image = picture(11, 7)
    inputs = processor(text=processor.prompt("What colour is it?"), images=image)
    found = model(**inputs).logits[0]

    resized = image.resize((12, 8), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    ids = encode_prompt(
        [Turn("human", "<image>\nWhat colour is it?")],
        num_images=1,
        template="qwen2",
        tokenizer=load_tokenizer(full_release[0]),
    )
    expected = eve(ReferenceSample(torch.from_numpy(ids), ((pixels - mean) / std,))).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_generation_is_greedy_without_penalty(model) -> None:  # type: ignore[no-untyped-def]
    config = model.generation_config
    assert (config.do_sample, config.repetition_penalty) == (False, 1.0)
    assert (config.eos_token_id, config.pad_token_id) == ([319, 317], 317)


def test_batch_of_mixed_prompts_is_answered_as_one_by_one(model, processor: EVEProcessor) -> None:  # type: ignore[no-untyped-def]
    """No image, one image, two images, an image and nothing else."""
    prompts = [
        processor.prompt("How many?", num_images=0),
        processor.prompt("What colour is the circle? red green"),
        processor.prompt("Which?", num_images=2),
        processor.prompt("", template="plain"),
    ]
    images = [
        [],
        [picture(8, 8)],
        [picture(4, 12, seed=1), picture(16, 16, seed=2)],
        [picture(5, 5)],
    ]

    def answer(texts: list[str], groups: list[list[Image.Image]]) -> list[str]:
        inputs = processor(text=texts, images=groups)
        output = model.generate(**inputs, max_new_tokens=8)
        return processor.answers(output, prompt_length=inputs["input_ids"].shape[1])

    together = answer(prompts, images)
    alone = [answer([p], [group])[0] for p, group in zip(prompts, images, strict=True)]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_prompt_equals_training(
    num_images: int, processor: EVEProcessor, full_release: FullRelease
) -> None:
    """Same ids as the training code's own prompt, for both templates."""
    tokenizer = load_tokenizer(full_release[0])
    marks = "<image>\n" * num_images
    for template, question in (("qwen2", "What is it?"), ("plain", "")):
        if template == "plain" and num_images == 0:
            continue
        turns = [Turn("human", marks + question)]
        expected = encode_prompt(
            turns, num_images=num_images, template=template, tokenizer=tokenizer
        )
        text = processor.prompt(question, num_images=num_images, template=template)
        pieces = [tokenizer.encode(piece) for piece in text.split("<image>")]
        found = pieces[0]
        for piece in pieces[1:]:
            found = [*found, IMAGE_PLACEHOLDER, *piece]
        assert found == expected.tolist()


def test_several_turns(processor: EVEProcessor) -> None:
    text = processor.conversation([("What?", "A circle."), ("Which colour?", None)])
    assert text.endswith(
        "USER: <image>\nWhat? ASSISTANT: A circle.<|im_end|>USER: Which colour? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("size", "max_size", "rule", "expected"),
    [
        ((640, 480), 800, "train", (640, 480)),
        ((336, 336), 800, "train", (320, 320)),
        ((1024, 768), 800, "train", (928, 704)),
        ((1920, 1080), 1600, "train", (1920, 1088)),
        ((3000, 4000), 1600, "train", (1376, 1856)),
        ((48, 48), 800, "train", (64, 64)),
        ((80, 80), 800, "train", (64, 64)),
        ((112, 112), 800, "train", (128, 128)),
        ((1, 1), 800, "train", (32, 32)),
        ((4000, 40), 800, "train", (4000, 32)),
        ((640, 480), 1600, "eval", (1856, 1408)),
        ((1920, 1080), 1600, "eval", (2144, 1216)),
        ((5000, 1000), 1600, "eval", (3584, 736)),
        ((16, 16), 1600, "eval", (1600, 1600)),
        ((4000, 40), 1600, "eval", (16000, 160)),
    ],
)
def test_official_resize_rules(
    size: tuple[int, int], max_size: int, rule: str, expected: tuple[int, int]
) -> None:
    assert target_size(*size, max_size=max_size, edge=32, rule=rule) == expected  # type: ignore[arg-type]


def test_resize_rule_changes_the_number_of_tokens(processor: EVEProcessor) -> None:
    image = picture(8, 8)
    by_train = processor(text="<image>", images=image)
    by_eval = processor(text="<image>", images=image, resize_rule="eval")
    assert by_train["input_ids"].shape == (1, 2 * 2 + 2 + 1)
    assert by_eval["input_ids"].shape == (1, 4 * 4 + 4 + 1)


def test_patches_lie_as_in_training(full_release: FullRelease) -> None:
    pixels = np.arange(8 * 12 * 3, dtype=np.float32).reshape(8, 12, 3)
    found = cut_patches(pixels, patch_stride=2, dense_stride=2)
    expected = patch_rows(torch.from_numpy(pixels).permute(2, 0, 1), full_release[1].config)
    assert torch.equal(torch.from_numpy(found), expected)


def test_image_is_turned_upright(processor: EVEProcessor) -> None:
    image = picture(4, 12)
    turned = picture(4, 12)
    turned.getexif()[0x0112] = 6  # to be shown rotated by 90 degrees
    kinds = [processor(text="<image>", images=i)["token_kinds"] for i in (image, turned)]
    assert kinds[0].tolist()[0] == [2, 1, 3, 1, 3, 1, 3]
    assert kinds[1].tolist()[0] == [2, 1, 1, 1, 3]


def test_processor_refuses_misuse(processor: EVEProcessor) -> None:
    with pytest.raises(ValueError, match=r"\[1\] <image> marks, but \[2\] images"):
        processor(text="<image> what?", images=[picture(4, 4), picture(4, 4)])
    with pytest.raises(ValueError, match=r"\[0\] <image> marks, but \[1\] images"):
        processor(text="what?", images=picture(4, 4))
    with pytest.raises(ValueError, match="resize_rule='square' is unknown"):
        processor(text="<image>", images=picture(4, 4), resize_rule="square")
    with pytest.raises(ValueError, match="no place for a question, found 'what"):
        processor.prompt("what?", template="plain")
    with pytest.raises(ValueError, match="Prompt 1 is empty; give a text, an image, or both"):
        processor(text=["what?", ""])
    for images in ("image.jpg", [["image.jpg"]], [picture(4, 4), "image.jpg"]):
        with pytest.raises(TypeError, match="must be PIL images, found str: open them first"):
            processor(text="<image>", images=images)
    with pytest.raises(ValueError, match="return_tensors='np' is not supported"):
        processor(text="what?", return_tensors="np")


def test_saved_again_it_is_the_same(
    tmp_path: Path,
    model,
    processor: EVEProcessor,
    full_release: FullRelease,  # type: ignore[no-untyped-def]
) -> None:
    """save_pretrained of transformers writes the same tensors under the same names, and code that loads again."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (full_release[0], tmp_path)
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.image_processor.max_size == 16
    AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_tied_release_has_no_second_embedding(tmp_path: Path, tokenizer_folder: Path) -> None:
    eve = build_reference(release_model(ALL, tokenizer_folder, tied=True))
    folder = write_reference_release(tmp_path / "tied", eve, tokenizer_folder)
    assert "lm_head.weight" not in SafetensorsFolder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sample = ReferenceSample(torch.tensor([1, 2, 3]))
    with torch.no_grad():
        logits = model(sample.ids[None]).logits[0]
        torch.testing.assert_close(logits, eve(sample).logits, rtol=1e-5, atol=1e-5)


def test_shards_and_index(tmp_path: Path, tokenizer_folder: Path) -> None:
    eve = build_reference(release_model(DENSE, tokenizer_folder))
    folder = write_reference_release(
        tmp_path / "sharded", eve, tokenizer_folder, max_shard_bytes=60_000
    )
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in eve.state_dict().values())
    read = SafetensorsFolder(folder)
    assert all(torch.equal(read[name], tensor) for name, tensor in eve.state_dict().items())
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    (folder / names[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[0]} cannot be read"):
        SafetensorsFolder(folder)


def test_release_stands_alone(full_release: FullRelease, tmp_path: Path) -> None:
    """In a process that cannot import this project, without network."""
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "m.generate(**p(text=p.prompt('red?', num_images=0)), max_new_tokens=2)\n"
        "assert not [n for n in sys.modules if n.startswith(('megatron', 'checkpoints_convert'))]\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(full_release[0])],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in full_release[0].glob("*.py")} == set(CODE_FILES)


@pytest.mark.parametrize("template", ["qwen2", "plain"])
def test_code_of_the_model_card_runs(
    template: str, full_release: FullRelease, tmp_path: Path
) -> None:
    """All of it, in its order: one question, then the conversation; of a model of captions, the caption."""
    folder = tmp_path / "eve"
    shutil.copytree(full_release[0], folder)
    picture(9, 9).save(folder / "image.jpg")
    facts = CardFacts(
        model=full_release[1].config, dtype="float32", image_edge=16, origin="", template=template,
        history=None,
    )  # fmt: skip
    if template == "qwen2":
        card = (folder / "README.md").read_text()
        assert model_card(facts).split("## Use")[1] == card.split("## Use")[1]
    blocks = re.findall(r"^```python\n(.*?)^```", model_card(facts), flags=re.M | re.S)
    assert len(blocks) == (2 if template == "qwen2" else 1)
    code = "\n".join(
        [*blocks, "print(output.shape[0], [len(turn) for turn in globals().get('history', [])])"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    turns = [2, 2] if template == "qwen2" else []  # (question, answer) of each
    assert done.stdout.splitlines()[-1] == f"1 {turns}"


def test_release_is_refused(
    full_release: FullRelease, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder, eve = full_release
    with pytest.raises(ConfigError, match=r"eve exists; .*--overwrite"):
        write_reference_release(folder, eve, tokenizer_folder)
    small = build_reference(dataclasses.replace(eve.config, vocab_size=61))
    with pytest.raises(CheckpointError, match=r"ids up to 319, the model 61 rows"):
        write_reference_release(tmp_path / "small", small, tokenizer_folder)
    assert not (tmp_path / "small").exists()
