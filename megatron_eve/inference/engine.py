# SPDX-License-Identifier: Apache-2.0
"""A released model in memory, and the batch of requests that it answers together.

`Engine` holds weights and tokenizer. `Flight` is the batch: requests join it when a row of the cache is free and leave
it when they are done, at any step, so that a short answer does not wait for a long one. `Engine.answer` and
`Engine.stream` are shortcuts. Not for use by two threads at once.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_eve import device as devices
from megatron_eve.config.schema import TemplateName
from megatron_eve.data.read.tokenizer import Tokenizer, load_tokenizer
from megatron_eve.errors import ConfigError, DataError
from megatron_eve.inference.cache import KeyValueCache
from megatron_eve.inference.decoder import EveForInference, rotary_table
from megatron_eve.inference.prompts import ChatTurn, PreparedImage, build_prompt, prepare_image
from megatron_eve.inference.ragged import Prompt, ragged
from megatron_eve.inference.release import ReleaseInfo, ResizeRule, check_tokenizer, read_release
from megatron_eve.inference.sampling import SamplingOptions, next_tokens
from megatron_eve.inference.text_stream import TextStream
from megatron_eve.inference.weights import load_weights

FinishReason = Literal["stop", "length"]
MAX_PREFILL_TOKENS = 16_384
"""Requests that join together are prefilled together up to this many tokens; a longer one goes alone."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to answer it."""

    prompt: Prompt
    options: SamplingOptions

    @property
    def num_tokens(self) -> int:
        """Tokens of the cache that it may need."""
        return len(self.prompt) + self.options.max_new_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    text: str
    tokens: tuple[int, ...]  # generated, the stop token included
    finish_reason: FinishReason  # stop: a stop token or a stop text; length: max_new_tokens


@dataclass(frozen=True, slots=True)
class Update:
    """What a step brought to one request."""

    number: int  # of the request, as `Flight.join` returned it
    text: str
    answer: Answer | None  # set with the last piece


class Engine:
    """Weights, tokenizer and the facts of the released folder."""

    def __init__(self, info: ReleaseInfo, tokenizer: Tokenizer, model: EveForInference) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.model = model
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.rotary = rotary_table(info.model, dtype=self.dtype, device=self.device)
        statistics = torch.tensor([info.images.mean, info.images.std], device=self.device)
        # A patch's row holds colour by colour, p * p pixels each.
        self._mean, self._std = statistics.repeat_interleave(info.model.patch_stride**2, dim=1)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Engine":
        """Read a released folder, offline. Without `device`: the first GPU if there is one; without `dtype`: the
        weights' own. Raises CheckpointError, ConfigError."""
        info = read_release(folder)
        tokenizer = load_tokenizer(folder)
        check_tokenizer(info, tokenizer)
        target = device or device_named(None)
        model = load_weights(folder, info.model, device=target, dtype=dtype)
        return cls(info, tokenizer, model)

    @property
    def context_tokens(self) -> int:
        """Positions that the model knows."""
        return self.info.model.max_position_embeddings

    def image(self, data: bytes, *, resize_rule: ResizeRule | None = None) -> PreparedImage:
        """Encoded bytes to patches. Raises DataError."""
        rules = self.info.images
        return prepare_image(data, model=self.info.model, rules=rules, resize_rule=resize_rule)

    def prompt(self, turns: Sequence[ChatTurn], *, template: TemplateName | None = None) -> Prompt:
        """`template`: None is the release's own. Raises DataError, also for a conversation with a model of captions."""
        chosen = template or self.info.template
        if chosen == "qwen2" and self.info.template == "plain":
            raise DataError(
                f"{self.info.folder} was trained on captions alone (template plain) and holds no conversation; use "
                "template plain."
            )
        return build_prompt(turns, template=chosen, tokenizer=self.tokenizer, model=self.info.model)

    def answer(self, requests: Sequence[Request], *, batch_size: int = 8) -> list[Answer]:
        """All answers, in the order of the requests; at most `batch_size` are in flight at a time."""
        answers: dict[int, Answer] = {}
        if not requests:
            return []
        tokens = max(request.num_tokens for request in requests)
        flight = Flight(self, rows=min(batch_size, len(requests)), tokens=tokens)
        waiting = list(reversed(requests))
        while waiting or flight.num_requests:
            while waiting and flight.num_free:
                flight.join(waiting.pop())
            answers |= {u.number: u.answer for u in flight.step() if u.answer is not None}
        return [answers[number] for number in range(len(requests))]

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of the answer as they come; none is empty."""
        flight = Flight(self, rows=1, tokens=request.num_tokens)
        flight.join(request)
        while flight.num_requests:
            for update in flight.step():
                if update.text:
                    yield update.text

    def pixels(self, patches: Tensor) -> Tensor:
        """uint8 patches on the device to normalised float32."""
        return (patches.float() / 255 - self._mean) / self._std


def device_named(name: str | None) -> torch.device:
    """The device of that name; None: the first GPU if there is one, else the CPU. Raises ConfigError."""
    try:
        device = torch.device(name) if name else devices.local_device(0)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected cpu, cuda or cuda:N.")
    if device.type == "cuda" and not devices.has_gpu():
        raise ConfigError(f"device is {name!r}, but no GPU is visible here; use cpu.")
    return device


@dataclass(slots=True)
class _InFlight:
    """A request that has a row."""

    number: int
    request: Request
    stream: TextStream
    draws: random.Random
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the row: all but the newest."""
        return len(self.request.prompt) + len(self.tokens) - 1


class Flight:
    """Requests in flight, one row of a cache each. Rows in use are the first ones."""

    def __init__(self, engine: Engine, *, rows: int, tokens: int) -> None:
        """`tokens`: the room of a row. Raises ConfigError if the model has fewer positions."""
        if tokens > engine.context_tokens:
            raise ConfigError(
                f"prompt and answer may take {tokens} tokens, the model has {engine.context_tokens} positions; "
                "shorten the prompt, send smaller images or lower max_new_tokens."
            )
        model = engine.info.model
        self._engine = engine
        self._cache = KeyValueCache.empty(
            model, rows=rows, tokens=tokens, dtype=engine.dtype, device=engine.device
        )
        self._occurred = torch.zeros(rows, model.vocab_size, dtype=torch.bool, device=engine.device)
        self._active: list[_InFlight] = []  # has a prefilled row: its index
        self._joined: list[_InFlight] = []  # waits for its prefill
        self._next_number = 0

    @property
    def num_requests(self) -> int:
        return len(self._active) + len(self._joined)

    @property
    def num_free(self) -> int:
        """Rows that a request can still take."""
        return self._cache.rows - self.num_requests

    def join(self, request: Request) -> int:
        """Take a free row; the first token comes with the next step. Returns the request's number, counted from 0."""
        assert self.num_free > 0 and request.num_tokens <= self._cache.tokens
        stream = TextStream(self._engine.tokenizer, stop=request.options.stop)
        number, self._next_number = self._next_number, self._next_number + 1
        self._joined.append(_InFlight(number, request, stream, request.options.draws()))
        return number

    def cancel(self, number: int) -> None:
        """Give a request's row back; unknown numbers (requests that are done) are ignored."""
        self._joined = [one for one in self._joined if one.number != number]
        for row, one in enumerate(self._active):
            if one.number == number:
                self._leave([row])
                return

    def clear(self) -> None:
        """Forget all requests after a failed step. The cache's memory stays: there may be none for another."""
        self._active, self._joined = [], []
        self._cache.clear()

    @torch.inference_mode()
    def step(self) -> list[Update]:
        """One more token for each request in flight, then the prefill and first token of those that joined."""
        updates: list[Update] = []
        if self._active:
            updates += self._take(0, self._decode())
        for group in self._prefill_groups():
            first = len(self._active)
            self._active += group
            updates += self._take(first, self._prefill(group, first))
        return updates

    def _prefill_groups(self) -> list[list[_InFlight]]:
        groups: list[list[_InFlight]] = []
        size = 0
        for one in self._joined:
            size += len(one.request.prompt)
            if not groups or size > MAX_PREFILL_TOKENS:
                groups.append([])
                size = len(one.request.prompt)
            groups[-1].append(one)
        self._joined = []
        return groups

    def _prefill(self, group: list[_InFlight], first: int) -> Tensor:
        engine = self._engine
        for row, one in enumerate(group, start=first):
            self._occurred[row] = False
            self._occurred[row, torch.from_numpy(one.request.prompt.text_ids)] = True
        batch = ragged([one.request.prompt for one in group], device=engine.device)
        return engine.model.prefill(
            batch,
            engine.pixels(batch.patches),
            engine.rotary,
            cache=self._cache,
            rows=range(first, first + len(group)),
        )

    def _decode(self) -> Tensor:
        engine = self._engine
        positions = [one.num_cached for one in self._active]
        return engine.model.decode(
            torch.tensor([one.tokens[-1] for one in self._active], device=engine.device),
            torch.tensor(positions, device=engine.device),
            engine.rotary,
            cache=self._cache,
            longest=max(positions) + 1,
        )

    def _take(self, first: int, logits: Tensor) -> list[Update]:
        """Choose a token for the active requests from row `first` on, and let go of those that are done."""
        group = self._active[first:]
        rows = slice(first, first + len(group))
        chosen = next_tokens(
            logits,
            [one.request.options for one in group],
            draws=[one.draws for one in group],
            occurred=self._occurred[rows],
        )
        self._occurred[rows].scatter_(1, chosen[:, None], True)
        updates = [_advance(one, token, self._engine.info.stop_ids) for one, token in
                   zip(group, chosen.tolist(), strict=True)]  # fmt: skip
        done = [row for row, update in enumerate(updates, start=first) if update.answer is not None]
        self._leave(done)
        return updates

    def _leave(self, rows: Sequence[int]) -> None:
        for row in sorted(rows, reverse=True):
            last = self._active.pop()
            if row < len(self._active):
                self._active[row] = last
                self._cache.move(source=len(self._active), target=row, length=last.num_cached)
                self._occurred[row] = self._occurred[len(self._active)]


def _advance(one: _InFlight, token: int, stop_ids: tuple[int, ...]) -> Update:
    """Add a token to a request."""
    one.tokens.append(token)
    is_stop = token in stop_ids
    piece = "" if is_stop else one.stream.push(token)
    is_done = is_stop or one.stream.stopped
    is_full = len(one.tokens) >= one.request.options.max_new_tokens
    if is_done or is_full:
        piece += one.stream.finish()
    one.text += piece
    if not (is_done or is_full):
        return Update(one.number, piece, None)
    reason: FinishReason = "stop" if is_done or one.stream.stopped else "length"
    answer = Answer(one.text, tuple(one.tokens), reason)
    return Update(one.number, piece, answer)
