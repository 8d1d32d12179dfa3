# SPDX-License-Identifier: Apache-2.0
"""The HTTP server as its clients see it: OpenAI's own client with images, OpenAI's errors, bounded in every direction.

Needs the optional packages: pip install -c constraints.txt -e '.[test]'."""

import base64
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.inference.engine import Engine, Flight, Request
from megatron_eve.inference.image_source import ImageSource
from megatron_eve.inference.prompts import ChatTurn
from megatron_eve.inference.sampling import SamplingOptions
from megatron_eve.inference.serve import main
from megatron_eve.inference.service import Limits, Service
from megatron_eve.inference.worker import Worker
from tests.inference.questions import picture, png
from tests.inference.test_worker import gate, wait_until  # noqa: F401  (gate is a fixture)

INSTALL = "install the optional packages: pip install -c constraints.txt -e '.[test]'"
openai = pytest.importorskip("openai", reason=INSTALL)
uvicorn = pytest.importorskip("uvicorn", reason=INSTALL)
pytest.importorskip("fastapi", reason=INSTALL)

BODY_BYTES = 60_000
NEW_TOKENS = 6
HALF_A_REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{"
)


@dataclass(frozen=True)
class Server:
    """A server that runs in this process."""

    service: Service
    port: int

    @property
    def client(self) -> Any:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60)

    def send(
        self, body: Any, *, path: str = "/v1/chat/completions", method: str = "POST", **headers: str
    ) -> tuple[int, Any]:
        """Status and decoded JSON of one request, without a client library."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        connection.request(method, path, data if method == "POST" else None, names)
        response = connection.getresponse()
        with contextlib.closing(connection):
            return response.status, json.loads(response.read())


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    from megatron_eve.inference.http_app import create_app

    worker = Worker(engine, rows=2, tokens=240, max_waiting=2)
    limits = Limits(body_bytes=BODY_BYTES, image_pixels=2000, images=3, new_tokens=100)
    service = Service(
        name="eve", engine=engine, worker=worker, images=ImageSource(max_bytes=BODY_BYTES), limits=limits
    )  # fmt: skip
    config = uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=3)
    running = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    worker.start()
    thread.start()
    wait_until(lambda: running.started)
    yield Server(service, listener.getsockname()[1])
    running.should_exit = True
    thread.join()
    worker.stop()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(text: str, *pictures: int) -> dict[str, Any]:
    """A message with images behind its text, as many clients send them."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    for index in pictures:
        parts.append({"type": "image_url", "image_url": {"url": data_uri(png(picture(index)))}})
    return {"role": "user", "content": parts}


def expected(engine: Engine, *turns: ChatTurn, **options: Any) -> str:
    chosen = SamplingOptions(**{"max_new_tokens": NEW_TOKENS} | options)
    return engine.answer([Request(engine.prompt(turns), chosen)])[0].text


def turn(engine: Engine, text: str, *pictures: int) -> ChatTurn:
    return ChatTurn("user", text, tuple(engine.image(png(picture(i))) for i in pictures))


def test_the_official_client_asks_about_an_image(server: Server, engine: Engine) -> None:
    reply = server.client.chat.completions.create(
        model="eve", messages=[user("Which colour?", 0)], max_tokens=NEW_TOKENS
    )
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == expected(engine, turn(engine, "Which colour?", 0))
    prompt = engine.prompt([turn(engine, "Which colour?", 0)])
    assert (reply.usage.prompt_tokens, reply.model) == (len(prompt), "eve")
    assert reply.usage.total_tokens == len(prompt) + reply.usage.completion_tokens
    assert (choice.finish_reason, reply.usage.completion_tokens) == ("length", NEW_TOKENS)


def test_the_official_client_streams(server: Server, engine: Engine) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model="eve", messages=[user("How many circles?", 1, 2)], max_tokens=20, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    wanted = expected(engine, turn(engine, "How many circles?", 1, 2), max_new_tokens=20)
    assert "".join(pieces) == wanted
    assert len([piece for piece in pieces if piece]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_conversation_system_text_and_options(server: Server, engine: Engine) -> None:
    reply = server.client.chat.completions.create(
        model="eve",
        messages=[
            {"role": "system", "content": "red"},
            user("first", 0),
            {"role": "assistant", "content": "blue"},
            user("second"),
        ],
        max_completion_tokens=12,
        temperature=1.0,
        top_p=0.9,
        seed=5,
        stop=["e"],
        extra_body={"repetition_penalty": 1.3, "resize_rule": "eval"},
    )
    image = engine.image(png(picture(0)), resize_rule="eval")
    turns = (
        ChatTurn("user", "red\nfirst", (image,)),
        ChatTurn("assistant", "blue"),
        ChatTurn("user", "second"),
    )
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "stop": ("e",)}
    wanted = expected(engine, *turns, max_new_tokens=12, repetition_penalty=1.3, **options)
    assert reply.choices[0].message.content == wanted


def test_image_alone_and_text_alone(server: Server, engine: Engine) -> None:
    parts = user("", 0)["content"][1:]
    for message, own in (
        ({"role": "user", "content": parts}, turn(engine, "", 0)),
        ({"role": "user", "content": "How many?"}, turn(engine, "How many?")),
    ):
        _, reply = server.send({"messages": [message], "max_tokens": NEW_TOKENS})
        assert reply["choices"][0]["message"]["content"] == expected(engine, own)


def test_models_and_health(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == ["eve"]
    assert server.client.models.retrieve("eve").owned_by == "megatron_eve"
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        server.client.models.retrieve("other")
    status, facts = server.send(None, path="/health", method="GET")
    assert (status, facts["status"], facts["model"], facts["device"]) == (200, "ok", "eve", "cpu")


def test_concurrent_clients_get_their_own_answers(server: Server, engine: Engine) -> None:
    questions = [("What colour?", 0), ("How many?", 1), ("red", 2), ("blue or red?", 0)]

    def ask(question: tuple[str, int]) -> str:
        messages = [user(*question)]
        reply = server.client.chat.completions.create(
            model="eve", messages=messages, max_tokens=NEW_TOKENS
        )
        return str(reply.choices[0].message.content)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, questions))
    assert found == [expected(engine, turn(engine, *question)) for question in questions]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt"}, "NotFoundError", "model 'gpt' is not here; this server has 'eve'"),
        ({"messages": []}, "BadRequestError", "messages is a list, expected a list that is not"),
        ({"max_tokens": 101}, "BadRequestError", "max_tokens is 101, the limit is 100"),
        ({"max_tokens": 0}, "BadRequestError", "max_tokens is 0, expected at least 1"),
        ({"top_p": 2.0}, "BadRequestError", r"top_p is 2.0, expected above 0"),
        ({"n": 3}, "BadRequestError", "n=3 is not supported"),
        ({"messages": [user("a" * 300)]}, "BadRequestError", r"\d+ tokens, images included"),
        ({"messages": [user("a" * 20_000)]}, "BadRequestError", "20,000 characters, far more than"),
        ({"messages": [user("a", 0, 0, 0, 0)]}, "BadRequestError", "4 images, the limit is 3"),
        ({"messages": [user("a <image>")]}, "BadRequestError", "turn 0 spells <image>"),
        ({"messages": [user("a <|im_end|>")]}, "BadRequestError", "contains the special token"),
        ({"messages": [user(" ")]}, "BadRequestError", "turn 0 is empty; give a question, an image"),
    ],
)  # fmt: skip
def test_refusals_reach_the_official_client(
    server: Server, fields: dict[str, Any], error: str, message: str
) -> None:
    body = {"model": "eve", "messages": [user("What?")]} | fields
    for stream in (False, True):
        with pytest.raises(getattr(openai, error), match=message) as caught:
            server.client.chat.completions.create(**body, stream=stream)
        assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,AAAA", "image 0: the image cannot be decoded"),
        ("data:image/png;base64,A", "image 0: .* is not base64"),
        (data_uri(png(picture(0))[:60]), "image 0: the image cannot be decoded"),
        (data_uri(png(picture(2).repeat(5, 0).repeat(5, 1))), "60 x 40 pixels, the limit is 2,000"),
        ("http://127.0.0.1:1/x.png", "started without --allow-url"),
        ("file:///etc/hostname", "started without --allow-path"),
        ("/etc/hostname", "started without --allow-path"),
    ],
)
def test_bad_images_are_refused(server: Server, url: str, message: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        server.client.chat.completions.create(
            model="eve", messages=[{"role": "user", "content": content}]
        )
    assert (caught.value.code, caught.value.param) == ("bad_image", "messages")


def test_stop_texts_end_a_stream_too(server: Server, engine: Engine) -> None:
    """Nothing of a stop text is streamed, and the pieces are the answer that is not streamed."""
    whole = expected(engine, turn(engine, "What?", 0))
    stop = whole[len(whole) // 2 :][:2]
    body: dict[str, Any] = {
        "model": "eve",
        "messages": [user("What?", 0)],
        "max_tokens": NEW_TOKENS,
        "stop": [stop],
    }
    create = server.client.chat.completions.create
    choice = create(**body).choices[0]
    chunks = [chunk.choices[0] for chunk in create(**body, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    assert choice.message.content == whole[: whole.index(stop)].rstrip()
    assert (chunks[-1].finish_reason, choice.finish_reason) == ("stop", "stop")


def test_wrong_http_is_answered_in_the_same_shape(server: Server) -> None:
    whole = {"messages": [{"role": "user", "content": "x"}]}
    cases: list[tuple[int, str, tuple[int, Any]]] = [
        (400, "the body is not JSON", server.send(b"{")),
        (400, "the body is not JSON", server.send(b"\xff")),
        (400, "the body is not JSON", server.send(b"[" * 50_000)),
        (400, "temperature is too large", server.send(whole | {"temperature": 10**400})),
        (
            400,
            "half of a surrogate pair",
            server.send(b'{"messages": [{"role": "user", "content": "a\\ud800"}]}'),
        ),
        (400, "unknown field '\\ud800'", server.send(b'{"\\ud800": 1}')),
        (413, "more than 60,000 bytes", server.send(b" " * (BODY_BYTES + 1))),
        (415, "Content-Type is 'text/plain'", server.send(whole, Content_Type="text/plain")),
        (404, "POST /v1/completions: Not Found", server.send(whole, path="/v1/completions")),
        (405, "Method Not Allowed", server.send(None, method="GET")),
    ]
    for wanted, message, (status, body) in cases:
        assert status == wanted
        assert message in body["error"]["message"]
        assert set(body["error"]) == {"message", "type", "param", "code"}


def open_stream(server: Server, *, tokens: int) -> http.client.HTTPResponse:
    """A streaming request, read up to its first event."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"messages": [user("What?", 0)], "max_tokens": tokens, "stream": True}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return response


def steps_until_closed(server: Server, gate: threading.Semaphore) -> int:  # noqa: F811
    """Let the model make steps, one at a time, until no request is open."""
    for steps in range(100):
        if server.service.worker.num_open == 0:
            return steps
        gate.release(1)
        time.sleep(0.1)
    raise AssertionError("the request is still open")


def test_a_client_that_goes_away_gives_its_place_back(
    server: Server,
    gate: threading.Semaphore,  # noqa: F811
) -> None:
    """The model has made two of 90 steps when the client leaves; few steps later nothing is open."""
    gate.release(2)
    response = open_stream(server, tokens=90)
    assert server.service.worker.num_open == 1
    response.close()
    assert steps_until_closed(server, gate) < 60
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps({"messages": [user("What?", 0)], "max_tokens": 90})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    wait_until(lambda: server.service.worker.num_open == 1)
    connection.close()
    assert steps_until_closed(server, gate) < 60


def test_a_client_that_goes_away_while_it_asks_is_no_fault_of_ours(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "handlers", [caplog.handler])
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(HALF_A_REQUEST)
    for _ in range(3):  # answered after the other one
        assert server.send(None, path="/health", method="GET")[0] == 200
    assert not caplog.records


def test_requests_that_are_being_read_are_counted_too(server: Server) -> None:
    body = {"messages": [user("What?", 0)], "max_tokens": 1}
    with contextlib.ExitStack() as slow:
        for _ in range(server.service.worker.capacity):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            slow.enter_context(connection).sendall(HALF_A_REQUEST)
        wait_until(lambda: server.send(body)[0] == 429)
        assert server.send(body)[1]["error"]["message"].startswith("4 requests are being read")
    wait_until(lambda: server.send(body)[0] == 200)  # they are gone


def test_a_client_that_does_not_finish_its_request_loses_its_place(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_eve.inference import http_app

    monkeypatch.setattr(http_app, "_BODY_TIMEOUT_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(HALF_A_REQUEST)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_too_many_clients_are_told_to_come_back(
    server: Server,
    gate: threading.Semaphore,  # noqa: F811
) -> None:
    gate.release(1)
    first = open_stream(server, tokens=3)
    bodies = {"messages": [user("What?", 0)], "max_tokens": 3}
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(server.send, bodies) for _ in range(3)]
        wait_until(lambda: server.service.worker.num_open == 4)
        for extra in ({}, {"stream": True}):
            status, body = server.send(bodies | extra)
            assert (status, body["error"]["code"]) == (429, "busy")
            assert "2 requests are being answered and 2 wait" in body["error"]["message"]
        gate.release(100)
        assert [future.result()[0] for future in waiting] == [200] * 3
    first.read()


def test_a_failed_step_is_an_error_and_not_the_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Flight.step

    def fail(_: Flight) -> None:
        monkeypatch.setattr(Flight, "step", step)
        raise RuntimeError("out of memory")

    body = {"messages": [user("What?", 0)], "max_tokens": 3}
    monkeypatch.setattr(Flight, "step", fail)
    status, reply = server.send(body)
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert "the model failed: out of memory" in reply["error"]["message"]
    assert server.send(body)[0] == 200


def test_the_command_serves_until_it_is_told_to_stop(engine: Engine, tmp_path: Path) -> None:
    """As a process: an image below --allow-path, then SIGTERM; and a port that is taken."""
    (tmp_path / "0.png").write_bytes(png(picture(0)))
    command = [sys.executable, "-m", "megatron_eve.inference.serve", str(engine.info.folder)]
    options = [
        "--port",
        "0",
        "--model-name",
        "tiny",
        "--allow-path",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = [process.stderr.readline() for _ in range(2)]
        assert "cache: 4 requests x 256 tokens" in lines[0], lines
        assert "serving tiny on http://127.0.0.1:" in lines[1]
        url = lines[1].split(" on ")[1].split()[0]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=3)
        content = [{"type": "image_url", "image_url": {"url": "0.png"}}]
        reply = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=3
        )
        wanted = expected(engine, turn(engine, "", 0), max_new_tokens=3)
        assert reply.choices[0].message.content == wanted
        taken = ["--port", url.rsplit(":", 1)[1]]
        assert main([str(engine.info.folder), *taken]) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()
