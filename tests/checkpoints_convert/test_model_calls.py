# SPDX-License-Identifier: Apache-2.0
"""Ways in which people call a released model: caches of both kinds, hidden states, attentions, positions, decoding
strategies. Each gives the plain reference's numbers or is refused by name; nothing is taken and ignored."""

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, StaticCache

from checkpoints_convert.hf.configuration_eve import EVEQwen2Config
from checkpoints_convert.hf.modality_eve import TEXT
from checkpoints_convert.hf.modeling_eve import EVEQwen2ForCausalLM
from checkpoints_convert.hf_config import model_json
from tests.checkpoints_convert.test_modeling import (
    PAD_ID,
    greedy,
    hf_batch,
    hf_config,
    released,
    samples,
)
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import tiny_model

OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD_ID}
STEPS = 5


@pytest.fixture(scope="module")
def eve() -> ReferenceEve:
    return build_reference(tiny_model(layers=2), seed=4)


@pytest.fixture(scope="module")
def model(eve: ReferenceEve) -> EVEQwen2ForCausalLM:
    return released(eve)


@pytest.fixture(scope="module")
def batch(eve: ReferenceEve) -> dict[str, Tensor]:
    """Samples of all kinds, padded on the left."""
    return hf_batch(list(samples().values()), eve.config)


@pytest.fixture(scope="module")
def continuations(eve: ReferenceEve) -> list[list[int]]:
    """By the reference, each sample alone."""
    return [greedy(eve, sample, STEPS) for sample in samples().values()]


def static_cache(model: EVEQwen2ForCausalLM, rows: int, tokens: int) -> StaticCache:
    """In the words of every version of transformers."""
    accepted = inspect.signature(StaticCache.__init__).parameters
    options = {
        "max_batch_size": rows, "max_cache_len": tokens, "device": torch.device("cpu"), "dtype": torch.float32,
    }  # fmt: skip
    given = {k: v for k, v in options.items() if k in accepted or k == "max_cache_len"}
    return StaticCache(config=model.config, **given)


@pytest.mark.parametrize(
    "strategy",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 1, "output_hidden_states": True},
        {"use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": False},
    ],
    ids=lambda strategy: ",".join(map(str, strategy)),
)
def test_a_batch_is_continued_as_its_prompts_alone(
    strategy: dict[str, Any],
    model: EVEQwen2ForCausalLM,
    batch: dict[str, Tensor],
    continuations: list[list[int]],
) -> None:
    output = model.generate(**batch, max_new_tokens=STEPS, **strategy, **OPTIONS)
    assert output[:, batch["input_ids"].shape[1] :].tolist() == continuations


def test_a_prompt_goes_in_by_chunks_or_is_refused(
    model: EVEQwen2ForCausalLM, batch: dict[str, Tensor], continuations: list[list[int]]
) -> None:
    """Chunks that are padding alone, chunks that end in an image. transformers 4.44 has none, 5 refuses pixels."""
    options = OPTIONS | {"max_new_tokens": STEPS, "prefill_chunk_size": 6}
    if transformers.__version__.startswith("4.57."):
        output = model.generate(**batch, **options)
        assert output[:, batch["input_ids"].shape[1] :].tolist() == continuations
    else:
        with pytest.raises(ValueError, match=r"prefill|prefill_chunk_size|Chunked"):
            model.generate(**batch, **options)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_static_cache_equals_a_growing_one(
    num_beams: int, model: EVEQwen2ForCausalLM, batch: dict[str, Tensor]
) -> None:
    given = batch | {"max_new_tokens": STEPS, "num_beams": num_beams} | OPTIONS
    growing, static = (
        model.generate(**given, cache_implementation=name) for name in (None, "static")
    )
    assert torch.equal(growing, static)


@pytest.mark.parametrize("name", ["two images", "text only"])
def test_guessed_tokens_change_nothing(
    name: str, eve: ReferenceEve, model: EVEQwen2ForCausalLM
) -> None:
    """Prompt look-up checks several tokens at once and rolls the cache back."""
    sample = samples()[name]
    inputs, expected = hf_batch([sample], eve.config), greedy(eve, sample, 8)
    end = min(set(range(eve.config.vocab_size)) - set(expected))  # the strategy wants to have one
    options = OPTIONS | {"eos_token_id": end, "max_new_tokens": 8, "prompt_lookup_num_tokens": 2}
    output = model.generate(**inputs, **options)
    assert output[0, inputs["input_ids"].shape[1] :].tolist() == expected


@torch.no_grad()
def test_a_static_cache_by_hand(
    model: EVEQwen2ForCausalLM, batch: dict[str, Tensor], continuations: list[list[int]]
) -> None:
    """Prefill and one step, without anything that says where the tokens go but the mask."""
    length = batch["input_ids"].shape[1]
    cache = static_cache(model, len(continuations), length + 3)
    first = model(**batch, past_key_values=cache).logits[:, -1].argmax(-1)
    assert first.tolist() == [tokens[0] for tokens in continuations]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = model(first[:, None], attention_mask=mask, past_key_values=cache).logits[:, -1]
    assert step.argmax(-1).tolist() == [tokens[1] for tokens in continuations]
    mask = torch.ones(len(mask), length + 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"static cache of {length + 3} tokens, {length + 4} are"):
        model(first[:, None], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_a_step_with_a_static_cache_compiles_as_a_whole(
    model: EVEQwen2ForCausalLM, batch: dict[str, Tensor], continuations: list[list[int]]
) -> None:
    """On a GPU transformers compiles it; a value that Python waited for would split it."""
    length = batch["input_ids"].shape[1]
    cache = static_cache(model, len(continuations), length + 2)
    first = model(**batch, past_key_values=cache).logits[:, -1].argmax(-1)
    ids = torch.cat((batch["input_ids"], first[:, None]), dim=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    inputs = model.prepare_inputs_for_generation(
        ids, past_key_values=cache, attention_mask=mask, cache_position=torch.tensor([length])
    )
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    found = compiled(**inputs, return_dict=True).logits[:, -1].argmax(-1)
    assert found.tolist() == [tokens[1] for tokens in continuations]


@torch.no_grad()
def test_hidden_states_are_the_streams_of_each_sample(
    eve: ReferenceEve, model: EVEQwen2ForCausalLM, batch: dict[str, Tensor]
) -> None:
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == eve.config.num_layers + 1
    logits = model(**batch).logits
    torch.testing.assert_close(model.lm_head(hidden[-1]), logits)
    for row, sample in enumerate(samples().values()):
        alone = model(**hf_batch([sample], eve.config), output_hidden_states=True).hidden_states
        real = batch["attention_mask"][row].bool()
        for padded, single in zip(hidden, alone, strict=True):
            torch.testing.assert_close(padded[row, real], single[0], rtol=1e-5, atol=1e-5)
    embedded = model.model.embed_tokens(samples()["text only"].ids)
    row = list(samples()).index("text only")
    assert torch.equal(hidden[0][row, -len(embedded) :], embedded)
    assert model(**batch).hidden_states is None


@torch.no_grad()
def test_attentions_are_the_weights_that_were_used(
    eve: ReferenceEve, model: EVEQwen2ForCausalLM, batch: dict[str, Tensor]
) -> None:
    """With the weights written out, and whichever implementation was chosen when the model was loaded."""
    found = model(**batch, output_attentions=True)
    torch.testing.assert_close(found.logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    heads, length = eve.config.num_attention_heads, batch["input_ids"].shape[1]
    shape = (len(batch["input_ids"]), heads, length, length)
    assert [weights.shape for weights in found.attentions] == [shape] * eve.config.num_layers
    real = batch["attention_mask"].bool()
    for weights in found.attentions:
        queries = weights.transpose(1, 2)[real]  # [T, N, K]
        torch.testing.assert_close(queries.sum(-1), torch.ones(queries.shape[:2]))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        assert not weights[:, :, later].any()
        rows = real.nonzero()[:, 0]
        assert not queries.transpose(1, 2)[~real[rows]].any()
    config = hf_config(eve.config)
    config._attn_implementation = "eager"
    eager = EVEQwen2ForCausalLM(config).eval()
    eager.load_state_dict(eve.state_dict())
    assert torch.equal(eager(**batch).logits, found.logits)
    assert eager(**batch).attentions is None


@torch.no_grad()
def test_settings_of_the_configuration_are_what_none_means(
    eve: ReferenceEve, batch: dict[str, Tensor]
) -> None:
    model = released(eve)
    assert isinstance(model(**batch).past_key_values, DynamicCache)
    assert model(**batch, use_cache=False).past_key_values is None
    model.config.use_cache = False
    model.config.output_hidden_states = True
    model.config.return_dict = False
    logits, hidden = model(**batch)
    assert len(hidden) == eve.config.num_layers + 1
    assert torch.equal(logits, model(**batch, return_dict=True).logits)
    assert model(**batch, return_dict=True, output_hidden_states=False).hidden_states is None


@torch.no_grad()
def test_positions(model: EVEQwen2ForCausalLM, eve: ReferenceEve, batch: dict[str, Tensor]) -> None:
    """Given ones are used, in a call and while generating; those of the mask, moved by a number, are the same model."""
    mask = batch["attention_mask"]
    counted = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(**batch).logits
    assert torch.equal(model(**batch, position_ids=counted).logits, logits)
    real = mask.bool()
    moved = model(**batch, position_ids=counted + 7).logits
    torch.testing.assert_close(moved[real], logits[real], rtol=1e-4, atol=1e-5)
    stretched = model(**batch, position_ids=counted * 3).logits
    assert (stretched - logits)[real].abs().max() > 1e-3
    inputs = hf_batch([samples()["two images"]], eve.config)
    positions = torch.arange(inputs["input_ids"].shape[1])[None] * 2
    found = model.generate(**inputs, position_ids=positions, max_new_tokens=3, **OPTIONS)
    ids, expected = inputs["input_ids"], inputs
    for _ in range(3):
        length = ids.shape[1]
        steps = positions[:, -1:] + torch.arange(1, length - positions.shape[1] + 1)
        given = torch.cat((positions, steps), dim=1)
        kinds = torch.nn.functional.pad(
            inputs["token_kinds"], (0, length - positions.shape[1]), value=TEXT
        )
        expected = {"input_ids": ids, "token_kinds": kinds, "pixel_values": inputs["pixel_values"]}
        token = model(**expected, position_ids=given).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, token[:, None]), dim=1)
    assert torch.equal(found, ids)


@torch.no_grad()
def test_kept_logits(model: EVEQwen2ForCausalLM, batch: dict[str, Tensor]) -> None:
    logits = model(**batch).logits
    for kept in (1, 3):
        torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, logits[:, -kept:])
    old = model(**batch, num_logits_to_keep=2).logits
    torch.testing.assert_close(old, logits[:, -2:])
    chosen = torch.tensor([-1, 4])
    torch.testing.assert_close(model(**batch, logits_to_keep=chosen).logits, logits[:, chosen])
    with pytest.raises(ValueError, match="logits_to_keep=2 and num_logits_to_keep=3; pass the fir"):
        model(**batch, logits_to_keep=2, num_logits_to_keep=3)
    with pytest.raises(ValueError, match="logits_to_keep=-1; expected 0"):
        model(**batch, logits_to_keep=-1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, eve: ReferenceEve, batch: dict[str, Tensor]) -> None:
    """Pixels stay float32 in the batch; the loss of precision is that of the weights."""
    model, real = released(eve), batch["attention_mask"].bool()
    wide = model(**batch).logits[real]
    narrow = model.to(dtype)(**batch).logits[real]
    assert (wide - narrow).abs().max() < 0.05 * wide.abs().max()
    output = model.generate(**batch, max_new_tokens=2, cache_implementation="static", **OPTIONS)
    assert output.shape[1] == batch["input_ids"].shape[1] + 2


def test_targets_at_padding_count_as_none(
    model: EVEQwen2ForCausalLM, eve: ReferenceEve, batch: dict[str, Tensor]
) -> None:
    labels = batch["input_ids"].masked_fill(batch["token_kinds"] != TEXT, -100)
    expected = [eve(sample) for sample in samples().values()]
    # The image alone has no target; the others' are text tokens after their first token.
    total = torch.zeros(())
    count = 0
    for row, output in enumerate(expected):
        real = batch["attention_mask"][row].bool()
        targets = labels[row, real][1:]
        rows = output.logits[:-1].log_softmax(-1)
        kept = targets != -100
        total = total - rows[kept].gather(1, targets[kept][:, None]).sum()
        count += int(kept.sum())
    torch.testing.assert_close(model(**batch, labels=labels).loss, total / count)


@torch.no_grad()
def test_misuse_is_refused_by_name(
    model: EVEQwen2ForCausalLM, eve: ReferenceEve, batch: dict[str, Tensor]
) -> None:
    ids, mask, kinds = batch["input_ids"], batch["attention_mask"], batch["token_kinds"]
    pixels = batch["pixel_values"]
    labels = ids.masked_fill(kinds != TEXT, -100)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "inputs_embeds is not supported", {"inputs_embeds": torch.zeros(1, 2, 8)}),
        (TypeError, "input_ids is missing", {"input_ids": None}),
        (TypeError, "'visible'", {"visible": mask}),
        (TypeError, "past_key_values is a tuple", {"past_key_values": ((ids, ids),)}),
        (ValueError, "pixel_values without token_kinds", {"token_kinds": None}),
        (ValueError, r"token_kinds holds \[7\]", {"token_kinds": kinds.where(kinds != 3, 7)}),
        (ValueError, r"patches of \[4, 9\] values, this model reads \[4, 12\]",
         {"pixel_values": pixels[..., :9]}),
        (ValueError, "more than the", {"pixel_values": torch.cat((pixels, pixels), dim=1)}),
        (ValueError, r"attention_mask has shape \[4, 3\], expected \[4, 15\]",
         {"attention_mask": mask[:, :3]}),
        (ValueError, r"attention_mask has shape \[4, 1, 15, 15\]",
         {"attention_mask": torch.ones(4, 1, 15, 15)}),
        (ValueError, "other values than 0", {"attention_mask": mask * 2}),
        (ValueError, r"position_ids has shape \[1, 3\]", {"position_ids": ids[:1, :3]}),
        (ValueError, r"labels has shape \[4, 14\]", {"labels": labels[:, 1:]}),
        (ValueError, "target at an image token", {"labels": ids}),
        (ValueError, "labels holds no target", {"labels": labels.fill_(-100)}),
    ]  # fmt: skip
    for kind, problem, changed in wrong:
        with pytest.raises(kind, match=problem):
            model(**(batch | changed))
    right = hf_batch(list(samples().values()), eve.config, side="right")
    with pytest.raises(ValueError, match=r"pad on the left \(processor\(\.\.\., padding_side="):
        model.generate(**right, max_new_tokens=2, **OPTIONS)
    for name in ("inputs_embeds", "visible", "tokens_kinds"):
        with pytest.raises((TypeError, ValueError), match=name):
            model.generate(**batch, max_new_tokens=2, **{name: torch.zeros(4, 15, 8)}, **OPTIONS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("moe_part", "layernorm-attention"),
        ("moe_part", ""),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused(
    field: str, value: Any, eve: ReferenceEve
) -> None:
    content = model_json(
        eve.config, dtype="float32", eos_id=1, pad_id=PAD_ID, image_edge=16, run=None
    )
    del content["model_type"]
    EVEQwen2ForCausalLM(EVEQwen2Config(**content))
    with pytest.raises(ValueError, match=r"not computed by this model|moe_part="):
        EVEQwen2ForCausalLM(EVEQwen2Config(**(content | {field: value})))
