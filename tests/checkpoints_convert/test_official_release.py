# SPDX-License-Identifier: Apache-2.0
"""A released folder and the official EVEv2 code (transformers 4.44.2): what it needs to load is there, and the released
model gives the logits that the official code computed on the same weights (tests/golden/official)."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from checkpoints_convert.automodel_layout import portable_tokenizer
from checkpoints_convert.hf.configuration_eve import EVEQwen2Config
from checkpoints_convert.hf.modeling_eve import EVEQwen2ForCausalLM
from checkpoints_convert.hf.processing_eve import EVEImageProcessor, EVEProcessor, PromptTokens
from megatron_eve.data.read.tokenizer import load_tokenizer
from tests.support.official import CASES, GOLDEN, initial_weights, micro_batches, official_batch
from tests.support.reference_eve import IGNORE, IMAGE_PLACEHOLDER, ReferenceEve
from tests.support.tiny import RawSample

FullRelease = tuple[Path, ReferenceEve]
PAD_ID = 60
# What the official classes read from config.json: configuration_qwen2.py:98-117, modeling_qwen2.py, eve_arch.py:14-46.
OFFICIAL_FIELDS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "rope_theta", "tie_word_embeddings", "use_cache", "use_sliding_window",
    "sliding_window", "max_window_layers", "attention_dropout", "eos_token_id", "pad_token_id",
    "add_moe", "moe_part", "mm_hidden_size", "mm_vision_tower",
}  # fmt: skip


def prompt(sample: RawSample, images: EVEImageProcessor) -> PromptTokens:
    """The sample through the released image processor."""
    prepared = iter(
        images.image_tokens(Image.fromarray(image.permute(1, 2, 0).numpy()))
        for image in sample.images
    )
    ids, kinds, patches = [], [], [np.zeros((0, 4, 768), np.float32)]
    for token in sample.ids.tolist():
        if token != IMAGE_PLACEHOLDER:
            ids.append(token)
            kinds.append(0)
            continue
        image = next(prepared)
        ids += [0] * len(image.kinds)
        kinds += image.kinds.tolist()
        patches.append(image.patches)
    return PromptTokens(np.asarray(ids), np.asarray(kinds), np.concatenate(patches))


def label_rows(sample: RawSample, kinds: np.ndarray) -> list[int]:
    """Positions of the expanded sample whose next token is a target."""
    targets = iter(sample.labels[sample.ids != IMAGE_PLACEHOLDER].tolist())
    expanded = [next(targets) if kind == 0 else IGNORE for kind in kinds.tolist()]
    return [row for row, target in enumerate(expanded[1:]) if target != IGNORE]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_the_official_ones(case: str) -> None:
    """Images as files through the released processor, four samples in one padded batch."""
    content = json.loads((GOLDEN / "configs.json").read_text())[case]
    model = EVEQwen2ForCausalLM(
        EVEQwen2Config(**{k: v for k, v in content.items() if k not in ("model_type", "torch_dtype")})
    ).eval()  # fmt: skip
    missing, unexpected = model.load_state_dict(initial_weights(case), strict=False)
    assert missing == (["lm_head.weight"] if case == "v2.0-tied" else [])
    assert unexpected == []
    images = EVEImageProcessor(max_size=800)
    samples = micro_batches()[0]
    prompts = [prompt(sample, images) for sample in samples]
    processor = EVEProcessor.__new__(EVEProcessor)
    processor.tokenizer = SimpleNamespace(pad_token_id=PAD_ID)
    batch = processor.collate(prompts)
    logits = model(**batch).logits
    length = batch["input_ids"].shape[1]
    found: list[Tensor] = []
    for row, (sample, tokens) in enumerate(zip(samples, prompts, strict=True)):
        start = length - len(tokens.ids)
        found.append(logits[row, [start + r for r in label_rows(sample, tokens.kinds)]])
    torch.testing.assert_close(torch.cat(found), official_batch(case).logits, rtol=0, atol=1e-5)


def test_every_field_that_the_official_classes_read_is_written(full_release: FullRelease) -> None:
    content = json.loads((full_release[0] / "config.json").read_text())
    assert set(content) >= OFFICIAL_FIELDS
    # head_dim is ours: the official code divides.
    assert content["head_dim"] * content["num_attention_heads"] == content["hidden_size"]
    assert content["architectures"] == ["EVEQwen2ForCausalLM"]


def test_preprocessor_is_the_official_one(full_release: FullRelease) -> None:
    """vision_tokenizer.py:15-18 opens it as a CLIPImageProcessor and reads three fields more."""
    content = json.loads((full_release[0] / "preprocessor_config.json").read_text())
    assert {"max_size", "patch_stride", "dense_stride"} <= set(content)
    switches = {key: content[key] for key in ("do_resize", "do_center_crop", "do_normalize")}
    assert switches == {"do_resize": False, "do_center_crop": False, "do_normalize": True}
    assert content["feature_extractor_type"] == "CLIPFeatureExtractor"


def test_tokenizer_is_written_for_old_readers_too(
    full_release: FullRelease, tokenizer_folder: Path
) -> None:
    """tokenizers 0.19, which transformers 4.44 brings, knows merges as "a b" only."""
    path = full_release[0] / "tokenizer.json"
    merges = json.loads(path.read_text())["model"]["merges"]
    assert merges and all(isinstance(merge, str) for merge in merges)
    text = "What colour is the circle?\n<|im_end|>  a b"
    assert load_tokenizer(full_release[0]).encode(text) == load_tokenizer(tokenizer_folder).encode(text)  # fmt: skip
    assert portable_tokenizer(path.read_text()) == path.read_text()
    with_space = json.dumps({"model": {"merges": [["a", " b"]]}})
    assert portable_tokenizer(with_space) == with_space
