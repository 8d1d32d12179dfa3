# SPDX-License-Identifier: Apache-2.0
"""The batch of requests in flight: who is in it changes nothing for the others; and what transformers answers from the
same released folder."""

import dataclasses
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.errors import ConfigError, DataError
from megatron_eve.inference.answers import load_released
from megatron_eve.inference.engine import Answer, Engine, Flight, Request, device_named
from megatron_eve.inference.prompts import ChatTurn, prepare_image
from megatron_eve.inference.sampling import SamplingOptions
from tests.inference.questions import picture, png, prompts

NEW_TOKENS = 8


def requests(engine: Engine, **options: object) -> list[Request]:
    values = {"max_new_tokens": NEW_TOKENS} | options
    chosen = SamplingOptions(**values)  # type: ignore[arg-type]
    return [Request(prompt, chosen) for prompt in prompts(engine)]


def collect(flight: Flight, answers: dict[int, Answer]) -> None:
    while flight.num_requests:
        answers |= {u.number: u.answer for u in flight.step() if u.answer}


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.5}, {"stop": ("e", "a")}],
    ids=["greedy", "sampled", "penalised", "stop texts"],
)
def test_any_batch_size_gives_the_same_answers(engine: Engine, options: dict[str, object]) -> None:
    asked = requests(engine, **options)
    alone = [engine.answer([one])[0] for one in asked]
    for batch_size in (2, 5):
        assert engine.answer(asked, batch_size=batch_size) == alone
    assert engine.answer([]) == []


def test_pieces_are_the_answer(engine: Engine) -> None:
    for one in requests(engine, max_new_tokens=12):
        pieces = list(engine.stream(one))
        assert "".join(pieces) == engine.answer([one])[0].text
        assert "" not in pieces


def test_who_comes_and_goes_disturbs_nobody(engine: Engine) -> None:
    """Requests join in mid-flight, one is cancelled before its prefill, one behind it; rows move."""
    lengths = (3, 9, 5, 8, 6)
    asked = [
        dataclasses.replace(one, options=SamplingOptions(max_new_tokens=length))
        for one, length in zip(requests(engine), lengths, strict=True)
    ]
    alone = [engine.answer([one])[0] for one in asked]
    flight = Flight(engine, rows=3, tokens=max(one.num_tokens for one in asked))
    answers: dict[int, Answer] = {}
    assert [flight.join(asked[0]), flight.join(asked[1])] == [0, 1]
    for _ in range(2):
        answers |= {u.number: u.answer for u in flight.step() if u.answer}
    cancelled = flight.join(asked[2])
    assert flight.num_free == 0
    flight.cancel(cancelled)
    assert flight.join(asked[3]) == 3
    answers |= {u.number: u.answer for u in flight.step() if u.answer}
    flight.cancel(1)
    flight.cancel(99)
    assert flight.join(asked[4]) == 4
    collect(flight, answers)
    assert answers == {0: alone[0], 3: alone[3], 4: alone[4]}


def test_reasons_and_counts(engine: Engine) -> None:
    (request, *_) = requests(engine, max_new_tokens=3)
    answer = engine.answer([request])[0]
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 3)
    first = answer.tokens[0]
    info = dataclasses.replace(engine.info, stop_ids=(first,))
    stopping = Engine(info, engine.tokenizer, engine.model)
    answer = stopping.answer([request])[0]
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", (first,), "stop")


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["train", "eval"])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_transformers_answers_the_same(engine: Engine, rule: str, penalty: float) -> None:
    """The released folder by its own Python files: prompt, resize, patches, tokens, text."""
    released = load_released(engine.info.folder, device="cpu")
    pixels = [picture(0), picture(1)]
    released_prompt = released.processor.prompt(" How many? ", num_images=2)
    images = [Image.fromarray(one) for one in pixels]
    inputs = released.processor(text=released_prompt, images=images, resize_rule=rule)
    output = released.model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, repetition_penalty=penalty
    )
    length = inputs["input_ids"].shape[1]
    prepared = tuple(engine.image(png(one), resize_rule=rule) for one in pixels)  # type: ignore[arg-type]
    prompt = engine.prompt([ChatTurn("user", " How many? ", prepared)])
    assert len(prompt) == length
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, repetition_penalty=penalty)
    answer = engine.answer([Request(prompt, options)])[0]
    assert list(answer.tokens) == output[0, length:].tolist()
    assert answer.text == released.processor.answers(output, prompt_length=length)[0]


def test_more_tokens_than_positions_are_refused(engine: Engine) -> None:
    (request, *_) = requests(engine, max_new_tokens=1000)
    with pytest.raises(ConfigError, match=r"may take 11\d\d tokens, the model has 256 positions"):
        engine.answer([request])


def test_bad_turns_are_named(engine: Engine) -> None:
    image = engine.image(png(picture(0)))
    for turns, message in (
        ([ChatTurn("user", "what <image>")], r"turn 0 spells <image>"),
        ([ChatTurn("user", "what <|im_end|>")], r"special token <\|im_end\|>"),
        ([ChatTurn("assistant", "red", (image,))], r"turn 0, the assistant's, has an image"),
        ([ChatTurn("user", "a"), ChatTurn("assistant", "b")], r"must end with a human turn"),
        ([ChatTurn("user", "a"), ChatTurn("user", "b")], r"turns_not_alternating"),
    ):
        with pytest.raises(DataError, match=message):
            engine.prompt(turns)
    for turns in ([ChatTurn("user", "what", (image,))], [ChatTurn("user", "")]):
        with pytest.raises(DataError, match=r"template plain writes a caption"):
            engine.prompt(turns, template="plain")


def test_bad_images_are_named(engine: Engine) -> None:
    whole = png(picture(2))
    with pytest.raises(DataError, match=r"the image cannot be decoded .* send a whole file"):
        engine.image(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"15 bytes of no known format"):
        engine.image(b"no image at all")
    # Pillow would hand this to Ghostscript; and decode this icon, of 1 x 1 pixel, to find 30 x 30.
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    inside = png(np.zeros((30, 30, 3), np.uint8))
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 1, 1, 0, 0, 1, 32, len(inside), 22) + inside
    for data in (script, icon):
        with pytest.raises(DataError, match=r"of no known format\); send a JPEG, PNG or WebP file"):
            engine.image(data)
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    beginning = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    bomb = (
        beginning
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IDAT"
        + bytes(4)
    )
    with pytest.raises(DataError, match=r"the image is too large .*900000000 pixels"):
        engine.image(bomb)
    with pytest.raises(DataError, match=r"the image is 12 x 8 pixels, the limit is 63 in all"):
        prepare_image(whole, model=engine.info.model, rules=engine.info.images, max_pixels=63)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_eve.device.has_gpu", lambda: False)
    assert device_named(None) == device_named("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"no GPU is visible here"):
        device_named("cuda")
    for name in ("gpu", "meta"):
        with pytest.raises(ConfigError, match=r"expected cpu, cuda or cuda:N"):
            device_named(name)
    monkeypatch.setattr("megatron_eve.device.has_gpu", lambda: True)
    assert device_named(None) == torch.device("cuda", 0)
