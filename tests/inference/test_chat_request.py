# SPDX-License-Identifier: Apache-2.0
"""Every field of a chat completion request: taken, known to be neutral, or refused by name."""

from typing import Any

import pytest

from megatron_eve.inference.chat_request import ApiError, Message, parse_chat_request

ASK = [{"role": "user", "content": "What?"}]


def image(url: Any = "data:image/png;base64,AA==") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_everything_that_is_read() -> None:
    chat = parse_chat_request(
        {
            "model": "eve",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, image("1"), image("2")],
                },
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": [image("3"), {"type": "text", "text": "c"}]},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 7,
            "max_completion_tokens": 8,
            "temperature": 1,
            "top_p": 0.5,
            "repetition_penalty": 1.05,
            "stop": ["x", "y"],
            "seed": 3,
            "resize_rule": "eval",
        }
    )
    assert chat.messages == (
        Message("system", "Be brief.", ()),
        Message("user", "a", ("1", "2")),
        Message("assistant", "b", ()),
        Message("user", "c", ("3",)),
    )
    assert chat.images == ("1", "2", "3")
    assert (chat.model, chat.stream, chat.include_usage, chat.max_new_tokens) == (
        "eve",
        True,
        True,
        8,
    )
    assert (chat.temperature, chat.top_p, chat.repetition_penalty) == (1.0, 0.5, 1.05)
    assert (chat.stop, chat.seed, chat.resize_rule) == (("x", "y"), 3, "eval")


def test_defaults_and_neutral_fields() -> None:
    plain = parse_chat_request({"messages": ASK})
    assert (plain.model, plain.stream, plain.max_new_tokens, plain.stop) == (None, False, None, ())
    neutral = {
        "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "tools": None,
        "logit_bias": {}, "response_format": {"type": "text"}, "user": "me", "stop": None,
        "temperature": None, "metadata": {"a": "b"},
    }  # fmt: skip
    assert parse_chat_request({"messages": ASK, **neutral}) == plain
    answered = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    shown = {"type": "image_url", "image_url": {"url": "1", "detail": "high"}}
    chat = parse_chat_request(
        {"messages": [{"role": "user", "name": "me", "content": [shown]}, answered, *ASK]}
    )
    assert [(message.text, message.images) for message in chat.messages] == [
        ("", ("1",)), ("b", ()), ("What?", ()),
    ]  # fmt: skip
    assert parse_chat_request({"messages": ASK, "stop": "x"}).stop == ("x",)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ([], None, "the body is a list, expected an object"),
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "expected a list that is not empty"),
        ({"messages": ["x"]}, "messages", r"messages\[0\] is a string"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", r"role is 'tool'"),
        ({"messages": [{"role": ["a"], "content": "x"}]}, "messages", r"role is \['a'\]"),
        ({"messages": [{"role": "user"}]}, "messages", r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", r"content is a list"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages", r"content\[0\] is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages",
            r"content\[0\] is an object of type 'audio'",
        ),
        (
            {"messages": [{"role": "user", "content": [image(None)]}]},
            "messages",
            r"content\[0\].image_url.url is missing, expected a string",
        ),
        (
            {"messages": [*ASK, {"role": "assistant", "content": "b", "tool_calls": [{}]}, *ASK]},
            "messages",
            r"messages\[1\] has the unknown field 'tool_calls'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1", "size": 2}}]}]},
            "messages",
            r"content\[0\].image_url has the unknown field 'size'",
        ),
        (
            {"messages": [{"role": "system", "content": [image()]}, *ASK]},
            "messages",
            r"messages\[0\] is from system; only the user sends images",
        ),
        ({"messages": ASK + ASK}, "messages", r"messages\[1\] is from user, expected assistant"),
        (
            {"messages": [*ASK, {"role": "assistant", "content": "x"}]},
            "messages",
            "the last message must be the user's",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "the last message must"),
        ({"messages": ASK, "n": 2}, "n", "n=2 is not supported"),
        ({"messages": ASK, "tools": [{}]}, "tools", "tools=.* is not supported"),
        ({"messages": ASK, "logprobs": True}, "logprobs", "logprobs=True is not supported"),
        ({"messages": ASK, "tempurature": 1}, "tempurature", "unknown field 'tempurature'"),
        ({"messages": ASK, "temperature": "1"}, "temperature", "a string, expected a number"),
        ({"messages": ASK, "max_tokens": 1.5}, "max_tokens", "a number, expected an integer"),
        ({"messages": ASK, "seed": True}, "seed", "seed is a boolean, expected an integer"),
        ({"messages": ASK, "stream": 1}, "stream", "stream is a number, expected true or false"),
        ({"messages": ASK, "stream_options": []}, "stream_options", "expected an object"),
        ({"messages": ASK, "stop": ["a"] * 5}, "stop", "a string or up to 4"),
        ({"messages": ASK, "stop": [""]}, "stop", "none of them empty"),
        ({"messages": ASK, "resize_rule": "big"}, "resize_rule", "expected train or eval"),
        ({"messages": ASK, "model": 3}, "model", "model is a number, expected a string"),
    ],
)  # fmt: skip
def test_what_is_refused(body: Any, param: str | None, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        parse_chat_request(body)
    error = caught.value.body["error"]
    assert (caught.value.status, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
