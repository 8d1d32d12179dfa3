# SPDX-License-Identifier: Apache-2.0
"""The released model against the plain reference: all variants, batches, caches, generation, errors."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from checkpoints_convert.hf.configuration_eve import EVEQwen2Config
from checkpoints_convert.hf.modality_eve import CLS, PATCH, SPL, TEXT
from checkpoints_convert.hf.modeling_eve import EVEQwen2ForCausalLM
from checkpoints_convert.hf_config import model_json
from checkpoints_convert.names import tensor_rules
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ModelConfig, SplitConfig
from megatron_eve.config.variants import moe_part_from_split
from tests.support.reference_eve import (
    IGNORE,
    IMAGE_PLACEHOLDER,
    ReferenceEve,
    ReferenceSample,
    build_reference,
)
from tests.support.tiny import ALL, patch_rows, tiny_model

SPLITS = [
    SplitConfig(norm=norm, attention=attention, ffn=ffn)
    for norm, attention, ffn in itertools.product((False, True), repeat=3)
]
PAD_ID = 0


def hf_config(model: ModelConfig) -> EVEQwen2Config:
    content = model_json(model, dtype="float32", eos_id=1, pad_id=PAD_ID, image_edge=16, run=None)
    return EVEQwen2Config(**{k: v for k, v in content.items() if k != "model_type"})


def released(eve: ReferenceEve) -> EVEQwen2ForCausalLM:
    """The released model with the reference's weights; strict but for a tied head."""
    model = EVEQwen2ForCausalLM(hf_config(eve.config)).eval()
    missing, unexpected = model.load_state_dict(eve.state_dict(), strict=False)
    assert missing == (["lm_head.weight"] if eve.config.tie_word_embeddings else [])
    assert not unexpected
    return model


def samples() -> dict[str, ReferenceSample]:
    """Text around two images of different shapes, an image and nothing else, text and nothing else."""
    generator = torch.Generator().manual_seed(5)
    wide, tall = (torch.randn(3, *size, generator=generator) for size in ((4, 12), (8, 4)))
    image = IMAGE_PLACEHOLDER
    return {
        "two images": ReferenceSample(torch.tensor([7, image, 9, 11, image, 13, 17]), (wide, tall)),
        "image only": ReferenceSample(torch.tensor([image]), (tall,)),
        "text only": ReferenceSample(torch.tensor([5, 6, 7, 8, 9])),
        "image first": ReferenceSample(torch.tensor([image, 3, 4]), (wide,)),
    }


def hf_batch(
    batch: list[ReferenceSample], model: ModelConfig, *, side: str = "left"
) -> dict[str, Tensor]:
    """The model's input, built token by token without the processor."""
    rows: list[tuple[list[int], list[int], Tensor]] = []
    for sample in batch:
        ids: list[int] = []
        kinds: list[int] = []
        patches = [torch.zeros(0, model.dense_stride**2, 3 * model.patch_stride**2)]
        images = iter(sample.images)
        for token in sample.ids.tolist():
            block = [TEXT]
            if token == IMAGE_PLACEHOLDER:
                pixels = next(images)
                edge = model.pixels_per_token
                height, width = pixels.shape[1] // edge, pixels.shape[2] // edge
                block = [CLS] + ([PATCH] * width + [SPL]) * height
                patches.append(patch_rows(pixels, model))
                token = 1
            kinds += block
            ids += [token] * len(block)
        rows.append((ids, kinds, torch.cat(patches)))
    length = max(len(ids) for ids, _, _ in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (length - len(values))
        return padding + values if side == "left" else values + padding

    return {
        "input_ids": torch.tensor([pad(ids, PAD_ID) for ids, _, _ in rows]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _, _ in rows]),
        "token_kinds": torch.tensor([pad(kinds, TEXT) for _, kinds, _ in rows]),
        "pixel_values": torch.nn.utils.rnn.pad_sequence([p for _, _, p in rows], batch_first=True),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: moe_part_from_split(split) or "dense")
@torch.no_grad()
def test_logits_equal_the_reference(split: SplitConfig, name: str) -> None:
    eve = build_reference(tiny_model(split))
    sample = samples()[name]
    logits = released(eve)(**hf_batch([sample], eve.config)).logits[0]
    torch.testing.assert_close(logits, eve(sample).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batch_equals_single_samples(side: str) -> None:
    eve = build_reference(tiny_model(tied=True))
    batch = list(samples().values())
    inputs = hf_batch(batch, eve.config, side=side)
    logits = released(eve)(**inputs).logits
    for row, sample in enumerate(batch):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], eve(sample).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_vision_tokens_use_vision_weights_alone() -> None:
    """NaN in a branch stays out of the other branch's tokens (the official blend lets it through)."""
    eve = build_reference(tiny_model(layers=1))
    model = released(eve)
    layer = model.model.layers[0]
    for module in (layer.moe_mlp, layer.self_attn.moe_o_proj):
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    sample = samples()["image first"]
    inputs = hf_batch([sample], eve.config)
    logits = model(**inputs).logits[0]
    is_vision = inputs["token_kinds"][0] != TEXT
    assert logits[is_vision].isnan().all()
    torch.testing.assert_close(logits[~is_vision], eve(sample).logits[~is_vision])


@torch.no_grad()
def greedy(eve: ReferenceEve, sample: ReferenceSample, steps: int) -> list[int]:
    """Greedy continuation by running the reference on the growing sequence."""
    ids, new = sample.ids, []
    for _ in range(steps):
        token = eve(ReferenceSample(ids, sample.images)).logits[-1].argmax()
        new.append(int(token))
        ids = torch.cat((ids, token[None]))
    return new


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generate_continues_each_prompt_of_a_batch(use_cache: bool) -> None:
    eve = build_reference(tiny_model())
    batch = list(samples().values())
    model = released(eve)
    inputs = hf_batch(batch, eve.config)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD_ID}
    output = model.generate(**inputs, max_new_tokens=6, use_cache=use_cache, **options)
    found = output[:, inputs["input_ids"].shape[1] :].tolist()
    assert found == [greedy(eve, sample, 6) for sample in batch]


def test_beams_repeat_images_with_their_prompts() -> None:
    eve = build_reference(tiny_model())
    model = released(eve)
    batch = [samples()["image first"], samples()["two images"]]
    options: dict[str, Any] = {
        "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4, "eos_token_id": None,
        "pad_token_id": PAD_ID, "do_sample": False,
    }  # fmt: skip
    together = model.generate(**hf_batch(batch, eve.config), **options)
    for row, sample in enumerate(batch):
        alone = model.generate(**hf_batch([sample], eve.config), **options)
        assert together[2 * row : 2 * row + 2, -4:].tolist() == alone[:, -4:].tolist()


@torch.no_grad()
def test_prefill_in_two_pieces_equals_one() -> None:
    """A prompt may go in by parts, the second of which holds an image, into the same cache."""
    eve = build_reference(tiny_model())
    model = released(eve)
    inputs = hf_batch([samples()["two images"]], eve.config)
    whole = model(**inputs).logits
    cut = 9  # after the class token of the second image
    first = {k: v[:, :cut] for k, v in inputs.items() if k != "pixel_values"}
    out = model(**first, pixel_values=inputs["pixel_values"][:, :3], use_cache=True)
    kwargs = model.prepare_inputs_for_generation(
        inputs["input_ids"],
        past_key_values=out.past_key_values,
        **{k: v for k, v in inputs.items() if k != "input_ids"},
    )
    rest = model(**kwargs).logits
    torch.testing.assert_close(torch.cat((out.logits, rest), dim=1), whole, rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_equal_the_reference() -> None:
    eve = build_reference(tiny_model(layers=2))
    model = released(eve)
    sample = samples()["two images"]
    inputs = hf_batch([sample], eve.config)
    labels = inputs["input_ids"].masked_fill(inputs["token_kinds"] != TEXT, IGNORE)
    loss = model(**inputs, labels=labels).loss
    output = eve(sample)
    expected = output.loss_sum / output.num_targets
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in eve.named_parameters():
        torch.testing.assert_close(
            gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_computes_layers_again_and_changes_nothing(
    use_reentrant: bool,
) -> None:
    model = released(build_reference(tiny_model(layers=2))).train()
    batch = [samples()["two images"], samples()["text only"]]
    inputs = hf_batch(batch, tiny_model(layers=2))
    calls: list[str] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append("layer"))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        labels = inputs["input_ids"].masked_fill(inputs["token_kinds"] != TEXT, IGNORE)
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(calls) == 2
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert len(calls) == 2 + 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model(**inputs, use_cache=True).logits.sum().backward()
    assert len(calls) == 6 + 2, "not with a cache, which would be filled twice"


def test_7b_has_the_official_names_and_shapes() -> None:
    """Built without memory; the names are those of the table, so those of the official checkpoint."""
    model = load_recipe("eve7b_stage2_2").model
    with torch.device("meta"):
        eve = EVEQwen2ForCausalLM(hf_config(model))
    found = {name: tuple(tensor.shape) for name, tensor in eve.state_dict().items()}
    expected = {
        name: shape
        for rule in tensor_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    assert found == expected
    assert len(found) == 681


def test_fresh_model_is_initialised_as_official() -> None:
    torch.manual_seed(0)
    model = EVEQwen2ForCausalLM(hf_config(tiny_model(ALL)))
    tower, layer = model.model.vision_tower, model.model.layers[0]
    assert 0.5 < tower.class_embedding.std() < 1.6
    assert layer.self_attn.moe_q_proj.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not layer.self_attn.moe_q_proj.bias.any()
    bound = (3 * 2 * 2) ** -0.5
    assert 0.8 * bound < tower.patch_embedding[0].weight.abs().max() <= bound


@torch.no_grad()
def test_tokens_under_autocast_are_put_together_in_one_dtype() -> None:
    """index_copy wants one dtype. Autocast sees to that on a CPU but not on a GPU, so its operands are looked at as
    they are given."""
    eve = build_reference(tiny_model(ALL, layers=1), seed=6)
    given = []

    class Given(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is Tensor.index_copy:
                given.append((args[0].dtype, args[3].dtype))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16), Given():
        released(eve)(**hf_batch(list(samples().values()), eve.config))
    assert len(given) > 1
    assert all(into is source for into, source in given)


@torch.no_grad()
def test_layers_on_another_device_find_their_tokens() -> None:
    """As from_pretrained(device_map="auto") spreads them over GPUs, and accelerate brings each its tensors. The other
    device computes shapes alone here."""
    eve = build_reference(tiny_model(ALL, layers=2), seed=6)
    model, other = released(eve), torch.device("meta")

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(other) if isinstance(value, Tensor) else value

    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to(other).register_forward_pre_hook(lambda _, given: moved(given))
    inputs = hf_batch(list(samples().values()), eve.config)
    logits = model(**inputs, use_cache=True).logits
    assert logits.device == other
    assert logits.shape == (*inputs["input_ids"].shape, eve.config.vocab_size)


@torch.no_grad()
def test_misuse_is_refused() -> None:
    eve = build_reference(tiny_model(layers=1))
    model = released(eve)
    inputs = hf_batch([samples()["two images"], samples()["text only"]], eve.config)
    with pytest.raises(ValueError, match=r"asks for \[5, 0\] patches in 2 samples, found no pixel"):
        model(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match=r"found pixel_values \[2, 4, 4, 12\]"):
        model(**(inputs | {"pixel_values": inputs["pixel_values"][:, :4]}))
    with pytest.raises(ValueError, match="attention_mask is 0 at an image token"):
        model(**(inputs | {"attention_mask": inputs["attention_mask"].fill_(0)}))
    with pytest.raises(ValueError, match=r"token_kinds has shape \[2, 3\]"):
        model(**(inputs | {"token_kinds": inputs["token_kinds"][:, :3]}))
