# SPDX-License-Identifier: Apache-2.0
"""Keys that nobody reads: what names media or holds a part of the conversation is refused, the rest is counted."""

from typing import Any

import pytest

from data_prep.quarantine import Rejected
from data_prep.unread_keys import unknown_keys

IMAGE = "train/leaf.png"
TURNS = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]

# fmt: off
MEDIA: list[dict[str, Any]] = [
    *({key: "x"} for key in ("video", "videos", "Video", "audio", "speech", "images", "Image", "IMAGE", "img", "photo",
                             "image_1", "image2", "imagePath", "video_path", "audio_url", "clip", "frames", "media")),
    *({key: ["x"]} for key in ("pictures", "image_list", "attachments", "point_cloud")),
    {"video": {"start": 3}},
    {"images": [{"bytes": "x", "path": None}]},
    {"anything": "clips/river.mp4"},
    {"source": "https://example.org/other.mp4?width=3"},
    {"image_url": "https://example.org/other.jpg"},
    {"file": "other.jpg"},
    {"images": "train.zip"},
    {"extra": {"deep": [{"er": "bird.wav"}]}},
    {"extra": "data:image/png;base64,iVBO"},
    {"extra": ["iVBORw0KGgo" + "A" * 99]},
    {"note": "See <video>."},
    {"note": "See <image>."},
    {"conversations": [{**TURNS[0], "image": "x"}, TURNS[1]]},
    {"conversations": [TURNS[0], {**TURNS[1], "files": ["a.pdf"]}]},
    {"a": {"a": {"a": {"a": {"picture": "x"}}}}},
]
DESCRIBES: list[dict[str, Any]] = [
    *({key: 7} for key in ("image_id", "image_width", "num_images", "video_id", "frame_count")),
    *({key: "x"} for key in ("image_class", "image_status")),
    *({key: "x"} for key in ("image_caption", "image_source", "imageTitle", "video_id", "clip_similarity")),
    {"image_size": [3, 4]},
    {"image_info": {"width": 3}},
]
ORIGINS: list[dict[str, Any]] = [
    {"url": "https://example.org/other.jpg?width=3"},  # as in ALLaVA
    {"coco_url": "http://example.org/1.jpg"},
    {"metadata": {"source": "https://example.org/paper.pdf"}},
    *({key: "IMG_1234.JPG"} for key in ("caption", "alt_text", "title")),
    {"ocr": [{"text": "LOGO.PNG"}]},
]
HARMLESS: list[dict[str, Any]] = [
    *({key: "x"} for key in ("licence", "model", "source", "url", "category", "caption", "text", "question", "movie")),
    *({key: 7} for key in ("score", "question_id", "prompt_id", "context_length")),
    *({key: value} for key in ("video", "images", "Image", "prompt") for value in (None, "", [], {}, False)),
    {"metadata": {"dataset": "x", "task_instruction": "y", "deep": [1, [2, {"a": None}]]}},
    {"conversations": [{**TURNS[0], "weight": 1}, TURNS[1]]},
    {"version": "3.5"},
    {"path": "src/app.ts"},
    *({key: "train-00012.parquet"} for key in ("source", "file", "__url__")),
    {"shard": "pipe:cat 00012.tar"},
]
# fmt: on


def check(
    fields: dict[str, Any], *, paths: tuple[str, ...] = (), ignored: tuple[str, ...] = ()
) -> tuple[str, ...]:
    return unknown_keys({"id": "x", "conversations": TURNS, **fields}, paths=paths, ignored=ignored)


@pytest.mark.parametrize("paths", [(), (IMAGE,)])
@pytest.mark.parametrize("fields", MEDIA, ids=str)
def test_media_that_nobody_reads_are_refused(
    fields: dict[str, Any], paths: tuple[str, ...]
) -> None:
    with pytest.raises(Rejected, match="only `image` is read") as error:
        check(fields, paths=paths)
    assert error.value.reason == "unread_media"


@pytest.mark.parametrize("fields", DESCRIBES, ids=str)
def test_a_description_costs_nothing_beside_the_image_that_it_describes(
    fields: dict[str, Any],
) -> None:
    check(fields, paths=(IMAGE,))
    with pytest.raises(Rejected, match="names a"):
        check(fields)


@pytest.mark.parametrize("fields", ORIGINS, ids=str)
def test_where_an_image_came_from_costs_nothing_beside_the_image(fields: dict[str, Any]) -> None:
    assert check(fields, paths=(IMAGE,)) == tuple(fields)
    with pytest.raises(Rejected, match="holds the path"):
        check(fields)


@pytest.mark.parametrize("paths", [(), (IMAGE,)])
@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_other_keys_are_named(fields: dict[str, Any], paths: tuple[str, ...]) -> None:
    (key,) = fields
    assert check(fields, paths=paths) == (
        "conversations.weight" if key == "conversations" else key,
    )


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {key: "Be brief."}
            for key in ("system_prompt", "System", "instruction", "prompt", "context")
        ),
        {"history": [["Hi", "Hello"]]},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ],
    ids=str,
)
def test_parts_of_the_conversation_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="belongs to the conversation") as error:
        check(fields)
    assert error.value.reason == "unread_text"


@pytest.mark.parametrize(
    ("fields", "is_same"),
    [
        ({"url": IMAGE}, True),
        ({"image_path": f"/data/{IMAGE}"}, True),
        ({"url": f"https://example.org/{IMAGE}"}, True),
        ({"file_name": "leaf.png"}, True),
        ({"images": [IMAGE]}, True),
        ({"other": "leaf.png"}, False),
        ({"file_name": "val/leaf.png"}, False),
        ({"images": [IMAGE, "b.png"]}, False),
    ],
    ids=str,
)
def test_a_key_may_repeat_what_image_holds(fields: dict[str, Any], is_same: bool) -> None:
    if is_same:
        assert check(fields, paths=(IMAGE,)) == tuple(fields)
    else:
        with pytest.raises(Rejected):
            check(fields, paths=(IMAGE,))


def test_a_user_may_know_better() -> None:
    assert check({"url": "a.jpg", "prompt": "x"}, ignored=("url", "prompt")) == ("url", "prompt")
