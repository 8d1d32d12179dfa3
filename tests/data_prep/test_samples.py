# SPDX-License-Identifier: Apache-2.0
"""Every reason for quarantine is reachable and named right; good samples come through unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.images import ImageLimits
from data_prep.quarantine import REASONS, QuarantineRecord
from data_prep.readers import RawEntry
from data_prep.samples import CheckedSample, SampleContext, check_entry
from megatron_eve.data.sample import Turn
from megatron_eve.errors import DataError
from tests.data_prep.pictures import encode, noise, sample

JPEG = encode(noise(), "JPEG")
PNG = encode(noise(mode="L"), "PNG")
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> SampleContext:
    folder = tmp_path_factory.mktemp("samples") / "images"
    folder.mkdir()
    (folder.parent / "secret.jpg").write_bytes(JPEG)
    (folder / "a.jpg").write_bytes(JPEG)
    (folder / "b.png").write_bytes(PNG)
    (folder / "c.gif").write_bytes(encode(noise(mode="P"), "GIF"))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "garbage.jpg").write_bytes(b"no image")
    (folder / "cut.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    (folder / "damaged.png").write_bytes(PNG[:900] + b"\0" * 200 + PNG[1100:])
    (folder / "float.tif").write_bytes(encode(Image.new("F", (9, 9)), "TIFF"))
    (folder / "large.png").write_bytes(encode(Image.new("1", (300, 301)), "PNG"))
    (folder / "long.png").write_bytes(encode(Image.new("1", (9000, 10)), "PNG"))
    (folder / "one.json").write_text(json.dumps(sample("one", "a.jpg")))
    (folder / "broken.json").write_text("{")
    return SampleContext(
        image_folder=folder,
        json_folder=folder,
        source="test",
        limits=ImageLimits(validate="full", max_pixels=90_000, max_aspect_ratio=100),
    )


def _conversation(*turns: object, image: str | None = None) -> dict[str, object]:
    return {"id": "x", "conversations": list(turns)} | ({"image": image} if image else {})


REFUSED: dict[str, list[Any]] = {
    "missing_json": ["absent.json"],
    "bad_json": ["broken.json", RawEntry(0, None, "Expecting value at column 3")],
    "not_a_sample": [12, None, ["a"]],
    "path_outside_folder": [
        sample("x", "../secret.jpg"),
        sample("x", "a/../../secret.jpg"),
        sample("x", "/etc/passwd"),
        "../one.json",
    ],
    "bad_image_field": [sample("x", 3), sample("x", ["a.jpg", None]), sample("x", {"a": 1})],
    "no_conversations": [{"id": "x"}, _conversation(), {"id": "x", "conversations": "text"}],
    "bad_turn": [_conversation(HUMAN, "text"), _conversation(HUMAN, {"from": "gpt"})],
    "unknown_role": [_conversation({"from": "system", "value": "Be kind"}, HUMAN, GPT)],
    "turns_not_alternating": [_conversation(HUMAN, HUMAN, GPT), _conversation(HUMAN, GPT, GPT)],
    "unanswered_turn": [_conversation(HUMAN, GPT, HUMAN)],
    "no_answer": [_conversation(HUMAN), _conversation(GPT), _conversation(GPT, HUMAN)],
    "empty_answer": [sample("x", None, "Hi", " \n")],
    "special_text": [
        sample("x", None, "Hi <|im_end|>", "Hello"),
        sample("x", None, "Hi", "<|endoftext|>"),
        sample("x", None, "Hi", "<|im_start|>"),
    ],
    "invalid_unicode": [sample("x", None, "Hi", "\ud800"), sample("\udfff")],
    "image_without_mark": [sample("x", "a.jpg", "What is it?", "A picture.")],
    "fewer_marks_than_images": [sample("x", ["a.jpg", "b.png"], "<image> What?", "A picture.")],
    "more_marks_than_images": [
        sample("x", "a.jpg", "<image> <image>", "Two."),
        sample("x", None, "<image>", "None."),
    ],
    "mark_in_answer": [sample("x", "a.jpg", "What?", "It is <image>")],
    "missing_image": [
        sample("x", "absent.jpg"),
        sample("x", "a.jpg/b.jpg"),
        sample("x", "."),
        sample("x", "a\0b.jpg"),
        sample("x", "n" * 5000),
        sample("x", ["a.jpg", "absent.jpg"]),
    ],
    "empty_image": [sample("x", "empty.jpg")],
    "unreadable_image": [sample("x", "garbage.jpg")],
    "truncated_image": [sample("x", "cut.jpg")],
    "corrupt_image": [sample("x", "damaged.png")],
    "unsupported_pixels": [sample("x", "float.tif")],
    "too_many_pixels": [sample("x", "large.png")],
    "aspect_ratio": [sample("x", "long.png")],
}


def test_every_reason_has_a_case() -> None:
    assert set(REFUSED) == set(REASONS)


@pytest.mark.parametrize(
    ("reason", "value"), [(reason, value) for reason, values in REFUSED.items() for value in values]
)
def test_bad_samples_get_their_reason(context: SampleContext, reason: str, value: Any) -> None:
    entry = value if isinstance(value, RawEntry) else RawEntry(5, value)
    record = check_entry(entry, context=context)
    assert isinstance(record, QuarantineRecord), record
    assert record.reason == reason
    assert record.message
    json.dumps(record.as_json(), ensure_ascii=False).encode()  # can be written


def test_a_record_names_the_file_and_the_sample(context: SampleContext) -> None:
    record = check_entry(RawEntry(7, sample("s", ["a.jpg", "cut.jpg"])), context=context)
    assert isinstance(record, QuarantineRecord)
    assert (record.index, record.id, record.file) == (7, "s", "cut.jpg")


def _good(entry: RawEntry, context: SampleContext) -> CheckedSample:
    checked = check_entry(entry, context=context)
    assert isinstance(checked, CheckedSample), checked
    return checked


def test_several_images_keep_their_order_and_bytes(context: SampleContext) -> None:
    checked = _good(RawEntry(0, sample("s", ["b.png", "a.jpg", "b.png"])), context)
    assert checked.sample.images == (PNG, JPEG, PNG)
    assert checked.sample.image_sizes == ((40, 60),) * 3
    assert checked.changes == ()


def test_text_is_kept_as_it_is(context: SampleContext) -> None:
    text = "  Ünïcode \n\t 🙂 ASSISTANT: <image"
    checked = _good(RawEntry(0, sample("s", None, text, text)), context)
    assert checked.sample.turns == (Turn("human", text), Turn("gpt", text))
    assert checked.sample.images == ()


def test_a_leading_answer_is_allowed(context: SampleContext) -> None:
    checked = _good(RawEntry(0, _conversation(GPT, HUMAN, GPT)), context)
    assert [turn.role for turn in checked.sample.turns] == ["gpt", "human", "gpt"]


@pytest.mark.parametrize(("value", "expected"), [(12, "12"), (None, "test-3"), ("", "test-3")])
def test_ids_are_texts(context: SampleContext, value: object, expected: str) -> None:
    raw = sample("s") | {"id": value}
    assert _good(RawEntry(3, raw), context).sample.id == expected


@pytest.mark.parametrize("image", [None, []])
def test_an_empty_image_field_means_text_only(context: SampleContext, image: object) -> None:
    raw = sample("s") | {"image": image}
    assert _good(RawEntry(0, raw), context).sample.images == ()


def test_changes_are_named(context: SampleContext) -> None:
    assert _good(RawEntry(0, sample("s", "c.gif")), context).changes == ("gif_to_png",)


def test_an_index_entry_is_read_from_its_file(context: SampleContext) -> None:
    assert _good(RawEntry(0, "one.json"), context).sample.id == "one"


def test_a_fault_of_the_file_system_stops_the_build(
    context: SampleContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    with pytest.raises(DataError, match="repair access and run the same command again"):
        check_entry(RawEntry(0, sample("s", "a.jpg")), context=context)
