# SPDX-License-Identifier: Apache-2.0
"""From a checked chat request to a request for the engine: images, conversation, limits. Knows nothing of HTTP."""

import time
from dataclasses import dataclass
from typing import Any

from megatron_eve.errors import EveError
from megatron_eve.inference.chat_request import ApiError, ChatRequest, Message
from megatron_eve.inference.engine import Engine, Request
from megatron_eve.inference.image_source import ImageSource
from megatron_eve.inference.prompts import ChatTurn, PreparedImage, prepare_image
from megatron_eve.inference.release import ResizeRule
from megatron_eve.inference.sampling import SamplingOptions
from megatron_eve.inference.worker import Worker

DEFAULT_NEW_TOKENS = 512
"""For a request that names no number, if the context has room."""

_CHARACTERS_PER_TOKEN = 64
"""More than any text has on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may hold."""

    body_bytes: int
    image_pixels: int
    images: int
    new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A model that is being served."""

    name: str
    engine: Engine
    worker: Worker
    images: ImageSource
    limits: Limits
    resize_rule: ResizeRule | None = None  # None: the release's

    def model_card(self) -> dict[str, Any]:
        """The entry of /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.engine.info.folder.stat().st_mtime),
            "owned_by": "megatron_eve",
            "context_tokens": self.worker.tokens,
        }

    def facts(self) -> dict[str, Any]:
        """The answer of /health."""
        return {
            "status": "ok",
            "model": self.name,
            "device": str(self.engine.device),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "open_requests": self.worker.num_open,
            "time": int(time.time()),
        }

    def request(self, chat: ChatRequest) -> Request:
        """Decode the images and put the prompt together: milliseconds to seconds of CPU. Raises ApiError."""
        if chat.model not in (None, self.name):
            raise ApiError(
                f"model {chat.model!r} is not here; this server has {self.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        if len(chat.images) > self.limits.images:
            raise ApiError(
                f"the conversation has {len(chat.images)} images, the limit is {self.limits.images}; send fewer.",
                param="messages",
                code="too_many_images",
            )
        num_characters = sum(len(message.text) for message in chat.messages)
        if num_characters > self.worker.tokens * _CHARACTERS_PER_TOKEN:  # not worth tokenising
            raise ApiError(
                f"the conversation has {num_characters:,} characters, far more than {self.worker.tokens} tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        turns = [self._turn(message, chat) for message in chat.messages]
        if chat.messages[0].role == "system":
            # The template has one system text, the one that the model was trained with.
            first = turns[1]
            text = "\n".join(t for t in (turns[0].text, first.text) if t)
            turns = [ChatTurn("user", text, first.images), *turns[2:]]
        try:
            prompt = self.engine.prompt(turns)
        except EveError as error:
            raise ApiError(str(error), param="messages") from error
        return Request(prompt, self._options(chat, num_prompt=len(prompt)))

    def _turn(self, message: Message, chat: ChatRequest) -> ChatTurn:
        images = tuple(self._image(url, chat) for url in message.images)
        if message.role == "assistant":
            return ChatTurn("assistant", message.text)
        return ChatTurn("user", message.text, images)

    def _image(self, url: str, chat: ChatRequest) -> PreparedImage:
        info = self.engine.info
        try:
            return prepare_image(
                self.images.read(url),
                model=info.model,
                rules=info.images,
                resize_rule=chat.resize_rule or self.resize_rule,
                max_pixels=self.limits.image_pixels,
            )
        except EveError as error:
            message = f"image {chat.images.index(url)}: {error}"
            raise ApiError(message, param="messages", code="bad_image") from error

    def _options(self, chat: ChatRequest, *, num_prompt: int) -> SamplingOptions:
        room = self.worker.tokens - num_prompt
        wanted = chat.max_new_tokens
        if wanted is not None and wanted < 1:
            raise ApiError(f"max_tokens is {wanted}, expected at least 1.", param="max_tokens")
        if wanted is not None and wanted > self.limits.new_tokens:
            raise ApiError(
                f"max_tokens is {wanted}, the limit is {self.limits.new_tokens}.",
                param="max_tokens",
            )
        default = min(DEFAULT_NEW_TOKENS, self.limits.new_tokens, room)
        if room < 1 or (wanted or 0) > room:
            raise ApiError(
                f"the prompt has {num_prompt} tokens, images included, and {wanted or 'at least 1'} are asked for; "
                f"{self.worker.tokens} in all is the limit. Send fewer or smaller images or ask for fewer tokens.",
                param="messages",
                code="context_length_exceeded",
            )
        if chat.temperature is None and 0 < (chat.top_p or 1.0) < 1:
            raise ApiError(
                f"top_p is {chat.top_p} without a temperature, which is 0 here (greedy) unless it is given: it would "
                "do nothing. Send a temperature, too, or leave it out.",
                param="top_p",
            )
        try:
            return SamplingOptions(
                max_new_tokens=default if wanted is None else wanted,
                temperature=chat.temperature or 0.0,
                top_p=1.0 if chat.top_p is None else chat.top_p,
                repetition_penalty=(
                    self.engine.info.repetition_penalty
                    if chat.repetition_penalty is None
                    else chat.repetition_penalty
                ),
                stop=chat.stop,
                seed=chat.seed,
            )
        except EveError as error:
            raise ApiError(str(error), param=str(error).split(" is ", maxsplit=1)[0]) from error
