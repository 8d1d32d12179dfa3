# SPDX-License-Identifier: Apache-2.0
"""The body of an OpenAI chat completion request, checked field by field.

What this model cannot do (tools, log probabilities, several choices) is refused, not ignored, unless the value asks for
nothing; so is an unknown field. Errors have OpenAI's shape and name the parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_eve.inference.release import RESIZE_RULES, ResizeRule

MAX_STOP_TEXTS = 4

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are understood, but only with a value that changes nothing."""
_LABELS = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier")
"""Fields that do not concern the answer."""
_READ = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "stop", "seed", "repetition_penalty", "resize_rule"),
)

_OF_A_MESSAGE = ("role", "content", "name")
"""Fields of a message; `name` concerns nothing."""
_OF_AN_IMAGE = ("url", "detail")
"""Fields of an image_url; `detail` concerns nothing, `resize_rule` decides how large an image is read."""


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


@dataclass(frozen=True, slots=True)
class Message:
    """One message; `images` are URLs in the order in which they came."""

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """The request. None: the server's default."""

    model: str | None
    messages: tuple[Message, ...]  # system first if there is one, then user and assistant in turn
    stream: bool
    include_usage: bool
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    repetition_penalty: float | None
    stop: tuple[str, ...]
    seed: int | None
    resize_rule: ResizeRule | None

    @property
    def images(self) -> tuple[str, ...]:
        """URLs of the whole conversation."""
        return tuple(url for message in self.messages for url in message.images)


def parse_chat_request(body: Any) -> ChatRequest:
    """From decoded JSON. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {_kind(body)}, expected an object.")
    for name, value in body.items():
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise ApiError(
                f"{name}={value!r} is not supported; leave it out.", param=name, code="unsupported"
            )
        if name not in (*_NEUTRAL, *_LABELS, *_READ):
            text = name.encode(errors="replace").decode()  # half of a surrogate pair cannot be sent
            raise ApiError(f"unknown field {name!r}; leave it out.", param=text, code="unknown")
    long, short = (_integer(body, f) for f in ("max_completion_tokens", "max_tokens"))
    options = _object(body, "stream_options")
    _refuse_unknown(options, ("include_usage",), "stream_options", param="stream_options")
    rule = body.get("resize_rule")
    if rule is not None and rule not in RESIZE_RULES:
        raise ApiError(f"resize_rule is {rule!r}, expected train or eval.", param="resize_rule")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(f"model is {_kind(model)}, expected a string.", param="model")
    return ChatRequest(
        model=model,
        messages=_messages(body.get("messages")),
        stream=_boolean(body, "stream"),
        include_usage=_boolean(options, "include_usage"),
        max_new_tokens=short if long is None else long,
        temperature=_number(body, "temperature"),
        top_p=_number(body, "top_p"),
        repetition_penalty=_number(body, "repetition_penalty"),
        stop=_stop(body.get("stop")),
        seed=_integer(body, "seed"),
        resize_rule=rule,
    )


def _messages(found: Any) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise ApiError(
            f"messages is {_kind(found)}, expected a list that is not empty.", param="messages"
        )
    messages = tuple(_message(entry, f"messages[{n}]") for n, entry in enumerate(found))
    spoken = messages[1:] if messages[0].role == "system" else messages
    first = len(messages) - len(spoken)
    for number, message in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            raise ApiError(
                f"messages[{first + number}] is from {message.role}, expected {expected}: after an optional system "
                "message, user and assistant take turns, the user first.",
                param="messages",
            )
    if len(spoken) % 2 == 0:
        raise ApiError("the last message must be the user's.", param="messages")
    return messages


def _message(entry: Any, place: str) -> Message:
    if not isinstance(entry, dict):
        raise ApiError(f"{place} is {_kind(entry)}, expected an object.", param="messages")
    role = entry.get("role")
    if role == "developer":  # OpenAI's newer word
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise ApiError(
            f"{place}.role is {role!r}, expected system, user or assistant.", param="messages"
        )
    _refuse_unknown(entry, _OF_A_MESSAGE, place)
    content = entry.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise ApiError(
            f"{place}.content is {_kind(content)}, expected a string or a list of parts.",
            param="messages",
        )
    texts, images = _parts(parts, place)
    if images and role != "user":
        raise ApiError(f"{place} is from {role}; only the user sends images.", param="messages")
    return Message(role, "\n".join(texts), tuple(images))


def _refuse_unknown(
    found: Mapping[str, Any], known: Sequence[str], place: str, *, param: str = "messages"
) -> None:
    """Refuse unknown fields (tool calls). Null and empty ones pass: clients send answers back as they got them."""
    for name, value in found.items():
        if name not in known and value not in (None, [], {}):
            raise ApiError(
                f"{place} has the unknown field {name!r}; leave it out.",
                param=param,
                code="unknown",
            )


def _parts(parts: Sequence[Any], place: str) -> tuple[list[str], list[str]]:
    """Texts and image URLs."""
    texts: list[str] = []
    images: list[str] = []
    for number, part in enumerate(parts):
        where = f"{place}.content[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _refuse_unknown(part, ("type", "text"), where)
            texts.append(part["text"])
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else None
            if not isinstance(url, str):
                raise ApiError(f"{where}.image_url.url is {_kind(url)}, expected a string.",
                               param="messages")  # fmt: skip
            _refuse_unknown(part, ("type", "image_url"), where)
            _refuse_unknown(image, _OF_AN_IMAGE, f"{where}.image_url")
            images.append(url)
        else:
            raise ApiError(
                f'{where} is {_kind(part)} of type {kind!r}, expected {{"type": "text", "text": ...}} or '
                '{"type": "image_url", "image_url": {"url": ...}}.',
                param="messages",
            )
    return texts, images


def _stop(found: Any) -> tuple[str, ...]:
    texts = [] if found is None else [found] if isinstance(found, str) else found
    is_fine = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not is_fine or len(texts) > MAX_STOP_TEXTS:
        raise ApiError(
            f"stop is {_kind(found)}, expected a string or up to {MAX_STOP_TEXTS}, none of them empty.",
            param="stop",
        )
    return tuple(texts)


def _number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ApiError(f"{name} is {_kind(value)}, expected a number.", param=name)
    try:
        return None if value is None else float(value)
    except OverflowError:  # an integer of hundreds of digits is good JSON
        raise ApiError(f"{name} is too large a number.", param=name) from None


def _integer(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ApiError(f"{name} is {_kind(value)}, expected an integer.", param=name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise ApiError(f"{name} is {_kind(value)}, expected true or false.", param=name)
    return bool(value)


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if not isinstance(value, dict | None):
        raise ApiError(f"{name} is {_kind(value)}, expected an object.", param=name)
    return value or {}


def _kind(value: Any) -> str:
    """The kind of a JSON value, for messages."""
    if value is None:
        return "missing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
