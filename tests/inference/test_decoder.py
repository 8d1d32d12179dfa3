# SPDX-License-Identifier: Apache-2.0
"""Prefill and cached decode compute what the plain reference computes without a cache, and every token runs through one
branch, once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_eve.config.schema import SplitConfig
from megatron_eve.inference.cache import KeyValueCache, cache_bytes
from megatron_eve.inference.engine import Engine, Request
from megatron_eve.inference.ragged import TEXT, Prompt, ragged
from megatron_eve.inference.sampling import SamplingOptions
from tests.checkpoints_convert.conftest import release_model, write_reference_release
from tests.inference.questions import prompts, reference_next, reference_samples
from tests.support.reference_eve import ReferenceEve, build_reference
from tests.support.tiny import ALL, DENSE

STEPS = 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VARIANTS = {
    "all": (ALL, False),
    "wider than its heads": (ALL, False),
    "dense": (DENSE, False),
    "ffn": (SplitConfig(norm=False, attention=False, ffn=True), False),
    "norm": (SplitConfig(norm=True, attention=False, ffn=False), False),
    "attention": (SplitConfig(norm=False, attention=True, ffn=False), False),
    "all, tied": (ALL, True),
}


@pytest.fixture(params=VARIANTS, scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, released_folder: Path
) -> tuple[Engine, ReferenceEve]:
    """A variant in a released folder of several shards, loaded; and the reference whose weights it holds."""
    split, tied = VARIANTS[request.param]
    tokenizer = released_folder.parent / "bpe"
    model = release_model(split, tokenizer, tied=tied)
    if request.param == "wider than its heads":
        model = replace(model, hidden_size=40)
    eve = build_reference(model, seed=6).eval()
    folder = tmp_path_factory.mktemp("variant") / "eve"
    write_reference_release(folder, eve, tokenizer, max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return Engine.load(folder, device=torch.device("cpu")), eve


def empty_cache(engine: Engine, *, rows: int, tokens: int = 160) -> KeyValueCache:
    model = engine.info.model
    return KeyValueCache.empty(
        model, rows=rows, tokens=tokens, dtype=engine.dtype, device=engine.device
    )


@torch.inference_mode()
def prefill(engine: Engine, asked: list[Prompt], cache: KeyValueCache) -> Tensor:
    batch = ragged(asked, device=engine.device)
    rows = range(len(asked))
    pixels = engine.pixels(batch.patches)
    return engine.model.prefill(batch, pixels, engine.rotary, cache=cache, rows=rows)


@torch.inference_mode()
def decode(engine: Engine, tokens: list[int], lengths: list[int], cache: KeyValueCache) -> Tensor:
    positions, longest = torch.tensor(lengths), max(lengths) + 1
    return engine.model.decode(
        torch.tensor(tokens), positions, engine.rotary, cache=cache, longest=longest
    )


@pytest.fixture(scope="module")
def expected(pair: tuple[Engine, ReferenceEve]) -> list[Tensor]:
    """Logits [prompts, vocabulary] before each of the greedy tokens, each by a full forward without a cache."""
    engine, eve = pair
    samples = reference_samples(engine)
    answers: list[list[int]] = [[] for _ in samples]
    logits = []
    for _ in range(STEPS):
        rows = [reference_next(eve, s, a) for s, a in zip(samples, answers, strict=True)]
        logits.append(torch.stack(rows))
        for answer, row in zip(answers, rows, strict=True):
            answer.append(int(row.argmax()))
    return logits


def test_logits_equal_the_uncached_reference(
    pair: tuple[Engine, ReferenceEve], expected: list[Tensor]
) -> None:
    """All prompts in one batch without padding; every logit of every step."""
    engine, _ = pair
    asked = prompts(engine)
    cache = empty_cache(engine, rows=len(asked))
    logits = prefill(engine, asked, cache)
    for step, wanted in enumerate(expected):
        torch.testing.assert_close(logits, wanted, **TOLERANCE)
        lengths = [len(prompt) + step for prompt in asked]
        logits = decode(engine, wanted.argmax(-1).tolist(), lengths, cache)


def test_greedy_tokens_equal_the_uncached_reference(
    pair: tuple[Engine, ReferenceEve], expected: list[Tensor]
) -> None:
    engine, _ = pair
    options = SamplingOptions(max_new_tokens=STEPS)
    found = engine.answer([Request(prompt, options) for prompt in prompts(engine)], batch_size=3)
    for index, answer in enumerate(found):
        tokens = [int(logits[index].argmax()) for logits in expected]
        ends = [place for place, token in enumerate(tokens) if token in engine.info.stop_ids]
        assert list(answer.tokens) == tokens[: ends[0] + 1 if ends else STEPS]
    assert len({answer.tokens for answer in found}) > 1


def test_batch_equals_single(pair: tuple[Engine, ReferenceEve]) -> None:
    engine, _ = pair
    asked = prompts(engine)
    together = prefill(engine, asked, empty_cache(engine, rows=len(asked)))
    for index, prompt in enumerate(asked):
        alone = prefill(engine, [prompt], empty_cache(engine, rows=1))
        torch.testing.assert_close(together[index], alone[0], **TOLERANCE)


def executed_rows(engine: Engine, run: Any) -> dict[str, int]:
    """Rows that each linear and norm of the decoder's layers was given."""
    rows: dict[str, int] = {}
    handles = []
    for name, module in engine.model.model.layers.named_modules():
        if not list(module.children()):

            def count(_: Any, inputs: tuple[Tensor], name: str = name) -> None:
                rows[name] = rows.get(name, 0) + len(inputs[0])

            handles.append(module.register_forward_pre_hook(count))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return rows


def test_every_token_runs_through_one_branch_once(engine: Engine) -> None:
    """Prefill: text rows and vision rows to their own weights. Last layer behind the attention: one row a prompt."""
    asked = prompts(engine)
    num_vision = sum(int((prompt.kinds != TEXT).sum()) for prompt in asked)
    num_text = sum(map(len, asked)) - num_vision
    num_last_vision = sum(int(prompt.kinds[-1] != TEXT) for prompt in asked)
    assert num_vision and num_last_vision
    cache = empty_cache(engine, rows=len(asked))
    rows = executed_rows(engine, lambda: prefill(engine, asked, cache))
    last = f"{len(engine.model.model.layers) - 1}."
    for name, count in rows.items():
        is_vision = "moe_" in name
        leads_to_kv = any(part in name for part in ("k_proj", "v_proj", "input_layernorm"))
        if name.startswith(last) and not leads_to_kv:
            expected = num_last_vision if is_vision else len(asked) - num_last_vision
        else:
            expected = num_vision if is_vision else num_text
        assert count == expected, name
    lengths = [len(prompt) for prompt in asked]
    rows = executed_rows(engine, lambda: decode(engine, [5] * len(asked), lengths, cache))
    assert not [name for name in rows if "moe_" in name]
    assert set(rows.values()) == {len(asked)}


def test_decode_reads_no_vision_weight(pair: tuple[Engine, ReferenceEve]) -> None:
    """Infinities in every weight of the vision branch and of the patch embedding change no bit of a decode step."""
    engine, _ = pair
    asked = prompts(engine)
    cache = empty_cache(engine, rows=len(asked))
    prefill(engine, asked, cache)
    lengths = [len(prompt) for prompt in asked]
    expected = decode(engine, [5] * len(asked), lengths, cache)
    vision = {
        name: weight.clone()
        for name, weight in engine.model.state_dict().items()
        if "moe_" in name or "vision_tower" in name
    }
    poisoned = {name: torch.full_like(weight, torch.inf) for name, weight in vision.items()}
    engine.model.load_state_dict(poisoned, strict=False)
    found = decode(engine, [5] * len(asked), lengths, cache)
    engine.model.load_state_dict(vision, strict=False)
    assert torch.equal(found, expected)


def test_cache_is_as_large_as_said(engine: Engine) -> None:
    cache = empty_cache(engine, rows=3, tokens=10)
    taken = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values))
    model = engine.info.model
    assert cache_bytes(model, rows=3, tokens=10, dtype=engine.dtype) == taken
    assert (cache.rows, cache.tokens) == (3, 10)


def test_bfloat16_follows_float32(released_folder: Path) -> None:
    """The dtype that releases have. The bound is what two roundings of bfloat16 a layer give on logits of size 1."""
    cpu = torch.device("cpu")
    wide = Engine.load(released_folder, device=cpu)
    narrow = Engine.load(released_folder, device=cpu, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    asked = prompts(wide)
    cosine = torch.cosine_similarity(
        prefill(wide, asked, empty_cache(wide, rows=len(asked))),
        prefill(narrow, asked, empty_cache(narrow, rows=len(asked))),
    )
    assert float(cosine.min()) > 0.999


def test_prompts_keep_their_order_when_images_end_some(engine: Engine) -> None:
    """Prompts that end with an image are sorted to the front inside the last layer only."""
    asked = prompts(engine)
    forward = prefill(engine, asked, empty_cache(engine, rows=len(asked)))
    backward = prefill(engine, asked[::-1], empty_cache(engine, rows=len(asked)))
    torch.testing.assert_close(forward, backward.flip(0), **TOLERANCE)
