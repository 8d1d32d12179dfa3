# SPDX-License-Identifier: Apache-2.0
"""Defects of the official inference code that a release does not share (docs/migration.md), where no other test of the
release already shows it."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from checkpoints_convert.automodel_layout import Release, write_release
from checkpoints_convert.hf.modality_eve import attention_bias
from tests.checkpoints_convert.test_release import picture
from tests.repo.tree import python_files, text_of
from tests.support.reference_eve import ReferenceEve

FullRelease = tuple[Path, ReferenceEve]


def test_inputs_embeds_is_refused_by_name(full_release: FullRelease) -> None:
    model = AutoModelForCausalLM.from_pretrained(full_release[0], trust_remote_code=True)
    embeds = torch.zeros(1, 3, model.config.hidden_size)
    with pytest.raises(TypeError, match="inputs_embeds"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_a_mask_exists_only_for_padding() -> None:
    """Without one, attention is causal by itself and no [L, L] tensor is made."""
    cpu = torch.device("cpu")
    assert attention_bias(None, 0, 7, device=cpu) is None
    assert attention_bias(None, 7, 1, device=cpu) is None
    padded = attention_bias(torch.tensor([[0, 1, 1]]), 0, 3, device=cpu)
    assert padded is not None
    allowed = [[True, False, False], [False, True, False], [False, True, True]]
    assert padded[0, 0].tolist() == allowed


def test_an_unpadded_prompt_makes_no_mask(
    full_release: FullRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor's mask of ones is none."""
    folder = full_release[0]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    seen: list[torch.Tensor | None] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *, attn_mask, is_causal):  # type: ignore[no-untyped-def]
        seen.append(attn_mask)
        return attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model(**processor(text=processor.prompt("red?"), images=picture(8, 8)))
    assert seen and all(mask is None for mask in seen)
    model(**processor(text=["red?", "<image> which colour?"], images=[[], [picture(8, 8)]]))
    assert seen[-1] is not None


def test_loaded_as_stored(
    tmp_path: Path, full_release: FullRelease, tokenizer_folder: Path
) -> None:
    """bfloat16 stays bfloat16, and rows beyond the tokenizer's stay."""
    eve = full_release[1]
    release = Release(
        model=eve.config, dtype="bfloat16", tokenizer=tokenizer_folder, image_edge=16, run=None,
        origin="a test",
    )  # fmt: skip
    tensors = {name: tensor.bfloat16() for name, tensor in eve.state_dict().items()}
    write_release(tmp_path / "bf16", release, tensors.items())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", trust_remote_code=True, dtype="auto"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    processor = AutoProcessor.from_pretrained(tmp_path / "bf16", trust_remote_code=True)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows == eve.config.vocab_size > len(processor.tokenizer)
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.named_parameters())


def test_palette_image_is_resized_as_rgb(full_release: FullRelease) -> None:
    processor = AutoProcessor.from_pretrained(full_release[0], trust_remote_code=True)
    palette = picture(11, 7).quantize(8)
    assert palette.mode == "P"
    found = processor(text="<image>", images=palette)["pixel_values"]
    expected = processor(text="<image>", images=palette.convert("RGB"))["pixel_values"]
    assert torch.equal(found, expected)
    nearest = palette.resize((12, 8), Image.Resampling.NEAREST).convert("RGB")
    assert not torch.equal(found, processor(text="<image>", images=nearest)["pixel_values"])


def test_no_option_is_of_type_bool() -> None:
    """argparse's type=bool takes "False" for true."""
    pattern = re.compile(r"\btype=bool\b")
    assert [path for path in python_files(tests=False) if pattern.search(text_of(path))] == []
    assert pattern.search('add_argument("--do_sample", type=bool)')
