# SPDX-License-Identifier: Apache-2.0
"""Marks of media that nobody reads are found; code, mark-up and the tokenizer's words are not taken for them."""

import pytest

from megatron_eve.data.read.media_names import media_kind, suffix_kind, unread_mark

MARKS = (
    *(
        "<video>",
        "<audio>",
        "<image_1>",
        "<image2>",
        "<image 3>",
        "<image-1>",
        "<image:1>",
        "<Image>",
        "<IMAGE>",
    ),
    *(
        "< image >",
        "<image/>",
        "<img>",
        "<img_2>",
        "<images>",
        "<picture>",
        "<photo1>",
        "<vid>",
        "<video_3>",
        "<frame_1>",
    ),
    *(
        "<speech>",
        "<sound>",
        "<music>",
        "<pdf>",
        "<point_cloud>",
        "<pointcloud>",
        "<movie_1>",
        "<figure_2>",
    ),
    *(
        "<|image|>",
        "<|image_pad|>",
        "<|vision_start|>",
        "<|video_pad|>",
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|depth|>",
    ),
    *(
        "<ImageHere>",
        "<IMG_CONTEXT>",
        "<image_placeholder>",
        "<start_of_image>",
        "<im_patch>",
        "<user_image>",
    ),
    *(
        "<fake_token_around_image>",
        "<img>leaf.png</img>",
        "[IMG]",
        "[image]",
        "[VIDEO 2]",
        "<图片>",
        "[图片]",
    ),
    *(
        "data:image/png;base64,iVBORw0KGgo=",
        "[image: a leaf]",
        "[Image #2]",
        "<#image#>",
        "&lt;image&gt;",
        "<boi>",
        "<image:leaf.png>",
        "<leaf.png>",
    ),
)
MARKS_OF_QUESTIONS = (
    "{image}",
    "<depth>\nHow far is it?\n",
    "\n<movie>\n",
    "{video_1}",
    "![a leaf](leaf.png)",
)
NO_MARKS = (
    *(
        "<image>",
        "<image",
        "a <image>\n<image> b",
        "<p>",
        "a < b > c",
        "<imagine>",
        "<T>",
        "<s>",
        "<mask>",
        "<table>",
    ),
    *(
        "</video>",
        "<video controls>",
        '<img src="a.png">',
        "<figure>",
        "<movie>",
        "<VideoPlayer />",
        "List<Image>",
    ),
    *("Map<String, Image>", "vector<Frame>", "<image_name>", "<video_id>", "<your_image_url>"),
    *("[Music]", "[image](https://example.org)", "a[1]", "List[Image]", "dict[str, list[Video]]"),
    *("the `<video>` of HTML", "the <img> tag", "how <audio> elements", "docker run <your-image>"),
    *("f'data:image/png;base64,{encoded}'", "'data:image/png;base64,' + encoded"),
    *(
        "<|box_start|>",
        "<|object_ref_end|>",
        "<|quad_start|>",
        "<|im_start|>",
        "<|fim_prefix|>",
        "<tool_call>",
    ),
)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("in_question", [True, False])
def test_a_mark_is_found_wherever_it_stands(mark: str, in_question: bool) -> None:
    for text in (mark, f"<image>\nLook: {mark} What is it?", f"图{mark}是"):
        assert unread_mark(text, in_question=in_question) is not None


@pytest.mark.parametrize("mark", MARKS_OF_QUESTIONS)
def test_what_answers_write_in_code_is_a_mark_in_questions_alone(mark: str) -> None:
    assert unread_mark(f"{mark} What is it?", in_question=True) is not None
    assert unread_mark(f"{mark} What is it?", in_question=False) is None


@pytest.mark.parametrize("code", ["data[image]", "show([image])", "images = [image]", "x[0][img]"])
def test_answers_may_write_lists(code: str) -> None:
    assert unread_mark(code, in_question=False) is None
    assert unread_mark(f"Draw {code}", in_question=True) is not None


@pytest.mark.parametrize("code", ["docker run ${image}", "print(f'{image}')", 'rf"{path}/{image}"'])
def test_what_code_fills_in_is_no_mark(code: str) -> None:
    assert unread_mark(f"What does {code} do?", in_question=True) is None


@pytest.mark.parametrize("text", ["<video> tag the scene", "See\n<video> element by element"])
def test_a_mark_at_the_start_of_a_line_is_no_tag_that_is_spoken_of(text: str) -> None:
    assert unread_mark(text, in_question=True) == "<video>"


@pytest.mark.parametrize("mark", ["<video>", "[image]", "<img>"])
@pytest.mark.parametrize("before", ["Watch", "Question\n", "List\n", "It is `Java`\n", "a = f''\n"])
def test_a_mark_behind_a_word_or_a_line_is_no_type(before: str, mark: str) -> None:
    assert unread_mark(f"{before}{mark}", in_question=True) == mark


@pytest.mark.parametrize(
    "question", ["<depth> How far?", "How far?\n<depth>\n", "Who plays?<movie>"]
)
def test_a_tag_that_stands_apart_is_a_mark_unless_it_is_closed(question: str) -> None:
    assert unread_mark(question, in_question=True) is not None
    assert unread_mark(question, in_question=False) is None
    name = question[question.index("<") + 1 : question.index(">")]
    assert unread_mark(f"{question}A</{name}>", in_question=True) is None


@pytest.mark.parametrize("text", NO_MARKS)
def test_other_text_is_no_mark(text: str) -> None:
    assert unread_mark(text, in_question=False) is None
    assert unread_mark(f"What is {text}?", in_question=True) is None


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("leaf.PNG", "picture"),
        ("https://example.org/a.jpeg?size=2#x", "picture"),
        ("clips/river.mp4", "video"),
        ("bird.wav", "sound"),
        ("page.pdf", "document"),
        ("depth/1.npy", "file of data"),
        ("leaf", None),
        (".png", None),
        ("3.5", None),
        ("Version 2.ts is\nnew.png", None),
    ],
)
def test_paths_are_known_by_their_suffix(path: str, kind: str | None) -> None:
    assert suffix_kind(path) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Image", "picture"),
        ("imagePaths", "picture"),
        ("IMG_2", "picture"),
        ("video", "video"),
        ("audio_path", "sound"),
        ("pointCloud", "document"),
        ("licence", None),
        ("imagination", None),
        ("model", None),
    ],
)
def test_names_speak_of_a_medium(name: str, kind: str | None) -> None:
    assert media_kind(name) == kind
