# SPDX-License-Identifier: Apache-2.0
"""The HTTP face of a served model: OpenAI's chat completions, models, health, and a page to chat with an image.

Nothing is fetched or read for a client unless the server was started to. Every error is JSON in OpenAI's shape. A
client that goes away frees its place. Only as many requests as the worker has places may be coming in at a time, so
that the memory for bodies is bounded too. Needs the optional packages of `serve` (setup.py).
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from megatron_eve.inference.chat_request import ApiError, ChatRequest, parse_chat_request
from megatron_eve.inference.engine import Answer, Update
from megatron_eve.inference.engine import Request as EngineRequest
from megatron_eve.inference.service import Service
from megatron_eve.inference.worker import BusyError

_LOOK_FOR_CLIENT_S = 0.25
"""How often, at most, a request that waits for its next token looks whether its client is still there."""
_PREPARED_AT_A_TIME = 4
"""Requests whose images are decoded at the same time; bounds the memory for pixels."""
_BODY_TIMEOUT_S = 60.0
"""How long a client may take to send a request: it holds a place meanwhile."""
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ClientGoneError(Exception):
    """The client has gone; there is no one to answer."""


def create_app(service: Service) -> FastAPI:
    """The application. `service.worker` must have been started."""
    app = FastAPI(title="megatron_eve", docs_url=None, redoc_url=None, openapi_url=None)
    preparing = asyncio.Semaphore(_PREPARED_AT_A_TIME)
    coming_in = 0  # requests that are read or prepared
    page = resources.files("megatron_eve.inference").joinpath("page.html").read_text("utf-8")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse(service.facts())

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        if name != service.name:
            raise ApiError(f"model {name!r} is not here.", status=404, code="model_not_found")
        return JSONResponse(service.model_card())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        nonlocal coming_in
        if coming_in >= service.worker.capacity:
            raise ApiError(
                f"{coming_in} requests are being read; try again later.", status=429, code="busy"
            )
        coming_in += 1
        try:
            chat = parse_chat_request(await _json_body(request, limit=service.limits.body_bytes))
            async with preparing:
                # Images are decoded in a thread: the event loop goes on serving the others.
                asked = await asyncio.to_thread(service.request, chat)
        finally:
            coming_in -= 1
        reply = _Reply(service.name, chat, num_prompt=len(asked.prompt))
        updates = _updates(service, asked, request)
        if not chat.stream:
            return await reply.whole(updates)
        first = await anext(updates)  # a full queue is refused before the stream has begun
        return StreamingResponse(reply.events(first, updates), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})  # fmt: skip

    _answer_errors_as_json(app)
    return app


async def _json_body(request: Request, *, limit: int) -> Any:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps other sites' pages away: a browser asks first before it sends this type across origins.
        raise ApiError(f"Content-Type is {kind!r}, expected application/json.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ApiError(
                        f"the body has more than {limit:,} bytes; send fewer or smaller images.",
                        status=413,
                        code="body_too_large",
                    )
    except ApiError:
        raise
    except TimeoutError:
        raise ApiError(
            f"the body did not come within {_BODY_TIMEOUT_S:g} s.", status=408, code="timeout"
        ) from None
    except Exception:  # the framework's own, from a package below it
        if await request.is_disconnected():
            raise ClientGoneError from None
        raise
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON ({error}).") from error


async def _updates(
    service: Service, asked: EngineRequest, request: Request
) -> AsyncIterator[Update]:
    """The worker's updates up to the last; gives the place back however this ends."""
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Update | Exception] = asyncio.Queue()

    def deliver(item: Update | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(inbox.put_nowait, item)

    try:
        ticket = service.worker.submit(asked, deliver)
    except BusyError as error:
        raise ApiError(str(error), status=429, code="busy") from error
    try:
        while True:
            try:
                item = await asyncio.wait_for(inbox.get(), timeout=_LOOK_FOR_CLIENT_S)
            except TimeoutError:
                item = None
            if await request.is_disconnected():
                raise ClientGoneError
            if isinstance(item, Exception):
                raise ApiError(f"the model failed: {item}", status=500) from item
            if item is not None:
                yield item
                if item.answer is not None:
                    return
    finally:
        service.worker.cancel(ticket)


class _Reply:
    """One completion in OpenAI's words."""

    def __init__(self, model: str, chat: ChatRequest, *, num_prompt: int) -> None:
        self._chat = chat
        self._num_prompt = num_prompt
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, updates: AsyncIterator[Update]) -> JSONResponse:
        """One object."""
        answer = None
        async for update in updates:
            answer = update.answer
        assert answer is not None
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
        }
        usage = self._usage(answer)
        head = self._head | {"object": "chat.completion"}
        return JSONResponse(head | {"choices": [choice], "usage": usage})

    async def events(self, first: Update, updates: AsyncIterator[Update]) -> AsyncIterator[str]:
        """Server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            update = first
            while True:
                if update.text:
                    yield self._chunk({"content": update.text})
                if update.answer is not None:
                    break
                update = await anext(updates)
        except ClientGoneError:
            return
        except ApiError as error:  # the status line is gone already
            yield _event(error.body)
            return
        finally:
            await updates.aclose()  # type: ignore[attr-defined]
        yield self._chunk({}, finish_reason=update.answer.finish_reason)
        if self._chat.include_usage:
            head = self._head | {"object": "chat.completion.chunk"}
            yield _event(head | {"choices": [], "usage": self._usage(update.answer)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], *, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(self._head | {"object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self, answer: Answer) -> dict[str, int]:
        num_new = len(answer.tokens)
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": num_new,
            "total_tokens": self._num_prompt + num_new,
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _answer_errors_as_json(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 429 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    # By status: the framework's own errors are of a class below fastapi's HTTPException.
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown_address(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}."
        body = ApiError(message, status=error.status_code).body
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(ClientGoneError)
    async def client_gone(_: Request, __: ClientGoneError) -> JSONResponse:
        return JSONResponse(ApiError("client closed the connection", status=499).body, 499)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        body = ApiError(f"internal error ({type(error).__name__}).", status=500).body
        return JSONResponse(body, status_code=500)
