# SPDX-License-Identifier: Apache-2.0
"""Every reason for quarantine is reachable and named right; good samples come through unchanged."""

import dataclasses
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
    (folder / "twice.json").write_text('{"image": "a.jpg", "image": "b.png", "conversations": []}')
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
    "duplicate_key": ["twice.json", RawEntry(0, None, "the key `image` twice", is_duplicate=True)],
    "not_a_sample": [12, None, ["a"]],
    "path_outside_folder": [
        sample("x", "../secret.jpg"),
        sample("x", "a/../../secret.jpg"),
        sample("x", "/etc/passwd"),
        "../one.json",
    ],
    "bad_id": [sample("x") | {"id": ["a"]}, sample("x") | {"id": {"a": 1}}],
    "bad_image_field": [
        *(sample("x", image) for image in (3, ["a.jpg", None], ["a.jpg", ""], {"a": 1})),
        *(
            sample("x", image)
            for image in ("river.mp4", "https://example.org/a.jpg", "s3://a/b.png")
        ),
        *(sample("x", image) for image in ("data:image/png;base64,iVBO", "/9j/" + "A" * 99)),
    ],
    "unread_media": [sample("x", video="river.mp4"), sample("x", Image="a.jpg")],
    "unread_text": [sample("x", system_prompt="Be brief."), sample("x", messages=[HUMAN])],
    "two_system_texts": [
        _conversation({"from": "system", "value": "Be kind"}, HUMAN, GPT) | {"system": "Be brief"}
    ],
    "no_conversations": [{"id": "x"}, _conversation(), {"id": "x", "conversations": "text"}],
    "bad_turn": [
        *(
            _conversation(HUMAN, turn)
            for turn in ("text", {"from": "gpt"}, {"From": "gpt", "Value": "a"})
        ),
        *(_conversation(HUMAN, {"from": "gpt", "value": value}) for value in (3, None, ["a"])),
        _conversation(HUMAN, GPT) | {"system": ["Be brief"]},
    ],
    "unknown_role": [
        *(
            _conversation({"from": role, "value": "Hi"}, GPT)
            for role in ("user", "Human", "tool", "")
        )
    ],
    "turns_not_alternating": [
        _conversation(HUMAN, HUMAN, GPT),
        _conversation(HUMAN, GPT, GPT),
        _conversation(HUMAN, {"from": "system", "value": "Be kind"}, GPT),
        _conversation(*[{"from": "system", "value": "Be kind"}] * 2, HUMAN, GPT),
    ],
    "unanswered_turn": [_conversation(HUMAN, GPT, HUMAN)],
    "no_answer": [_conversation(HUMAN), _conversation(GPT), _conversation(GPT, HUMAN)],
    "empty_question": [sample("x", None, "Hi", "Hello", "", "Yes")],
    "empty_answer": [sample("x", None, "Hi", " \n"), sample("x", None, "Hi", "Hello", "Why?", "")],
    "special_text": [
        sample("x", None, "Hi <|im_end|>", "Hello"),
        sample("x", None, "Hi", "<|endoftext|>"),
    ],
    "invalid_unicode": [sample("x", None, "Hi", "\ud800"), sample("\udfff")],
    "image_without_mark": [
        sample("x", "a.jpg", "What is it?", "A picture.", "Is it?", "Yes."),
        sample("x", ["a.jpg", "b.png"], "What is it?", "Two pictures."),
    ],
    "fewer_marks_than_images": [sample("x", ["a.jpg", "b.png"], "<image> What?", "A picture.")],
    "more_marks_than_images": [
        sample("x", "a.jpg", "<image> <image>", "Two."),
        sample("x", None, "<image>", "None."),
    ],
    "mark_in_answer": [sample("x", "a.jpg", "What?", "It is <image>")],
    "mark_in_system": [sample("x", "a.jpg", "What?", "It is", system="See <image>")],
    "unread_mark": [
        sample("x", None, "<video>\nWhat?", "Yes."),
        sample("x", "a.jpg", "<image> <image_1>", "Yes."),
        sample("x", None, "What?", "See <audio>."),
        sample("x", None, "What?", "Yes.", system="You see <|image_pad|>."),
    ],
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


@pytest.mark.parametrize(
    ("value", "turns", "expected"),
    [
        (
            None,
            [{"from": "system", "value": "Be brief."}, HUMAN, GPT],
            ["Be brief.", "Hi", "Hello"],
        ),
        ("Be brief.", [HUMAN, GPT], ["Be brief.", "Hi", "Hello"]),
        (
            "Be brief.",
            [{"from": "system", "value": " Be brief. "}, HUMAN, GPT],
            ["Be brief.", "Hi", "Hello"],
        ),
        (
            "Be brief.",
            [{"from": "system", "value": ""}, GPT, HUMAN, GPT],
            ["Be brief.", "Hello", "Hi", "Hello"],
        ),
        ("", [{"from": "system", "value": " "}, HUMAN, GPT], ["Hi", "Hello"]),
        (None, [HUMAN, GPT], ["Hi", "Hello"]),
    ],
)
def test_a_system_text_is_stored_once(
    context: SampleContext, value: object, turns: list[object], expected: list[str]
) -> None:
    checked = _good(RawEntry(0, _conversation(*turns) | {"system": value}), context)
    assert [turn.text for turn in checked.sample.turns] == expected
    assert checked.unknown_keys == ()


def test_a_caption_without_mark_is_stored_for_plain(context: SampleContext) -> None:
    for question in ("", "What is it?"):
        checked = _good(RawEntry(0, sample("s", "a.jpg", question, "A picture.")), context)
        assert checked.templates == ("plain",)
    assert _good(RawEntry(0, sample("s", "a.jpg")), context).templates == ("qwen2", "plain")
    assert _good(RawEntry(0, sample("s", None, *"abcd")), context).templates == ("qwen2",)


@pytest.mark.parametrize("image", [None, [], ""])
def test_an_empty_image_field_means_text_only(context: SampleContext, image: object) -> None:
    raw = sample("s") | {"image": image}
    assert _good(RawEntry(0, raw), context).sample.images == ()


@pytest.mark.parametrize(
    "path",
    [
        "{folder}/a.jpg",
        "{folder}/../images/a.jpg",
        "../images/a.jpg",
        "./a.jpg",
        "../images/../images/./a.jpg",
        "{real}/a.jpg",
        "link/b.png",
        "../images/link/b.png",
    ],
)
def test_every_spelling_of_a_path_inside_the_folder_is_read(
    context: SampleContext, tmp_path: Path, path: str
) -> None:
    """The folder is given through a link, and holds a link that leads out of it, which is fine."""
    real = context.image_folder.resolve()
    (tmp_path / "images").symlink_to(real)
    (real / "link").unlink(missing_ok=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.png").write_bytes(PNG)
    (real / "link").symlink_to(tmp_path / "elsewhere")
    linked = dataclasses.replace(context, image_folder=tmp_path / "images")
    spelled = path.format(folder=tmp_path / "images", real=real)
    images = _good(RawEntry(0, sample("s", spelled)), linked).sample.images
    assert images == (PNG if path.endswith("png") else JPEG,)


@pytest.mark.parametrize("path", ["{folder}/../secret.jpg", "../secret.jpg", "link/../secret.jpg"])
def test_a_path_that_leads_out_is_refused_with_what_is_true(
    context: SampleContext, tmp_path: Path, path: str
) -> None:
    folder = tmp_path / "photos"
    (folder.parent / "away/deep").mkdir(parents=True)
    folder.mkdir()
    (folder / "link").symlink_to(folder.parent / "away/deep")
    for place in (folder.parent, folder.parent / "away"):
        (place / "secret.jpg").write_bytes(JPEG)
    inside = dataclasses.replace(context, image_folder=folder)
    record = check_entry(RawEntry(0, sample("s", path.format(folder=folder))), context=inside)
    assert isinstance(record, QuarantineRecord)
    assert record.reason == "path_outside_folder"
    assert f"is outside {folder}" in record.message


def test_everything_is_inside_the_root(context: SampleContext) -> None:
    root = dataclasses.replace(context, image_folder=Path("/"))
    path = str(context.image_folder / "a.jpg")
    for spelled in (path, path[1:], f"/..{path}"):
        assert _good(RawEntry(0, sample("s", spelled)), root).sample.images == (JPEG,)


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
