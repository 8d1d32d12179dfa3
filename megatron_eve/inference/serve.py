# SPDX-License-Identifier: Apache-2.0
"""Serve a released model over HTTP: python -m megatron_eve.inference.serve FOLDER

OpenAI's API under /v1 (chat completions with images, streaming or not), /health, and a page at / to drop an image in
and chat. Listens on this machine only unless --host says otherwise; there is no authentication. Images come as data:
URIs; --allow-url and --allow-path open the network and a folder to all who can reach the server. Exit codes: 0 stopped
by Ctrl-C or SIGTERM, 1 cannot serve, 2 wrong usage, 130 Ctrl-C before it serves.
"""

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError

_MIB = 2**20
_log = logging.getLogger("megatron_eve.serve")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped and return the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _serve(arguments)
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    from megatron_eve.inference.release import read_release

    if read_release(arguments.folder).template == "plain":
        raise ConfigError(
            f"{arguments.folder} was trained on captions alone (template plain) and holds no conversation; use "
            "`python -m megatron_eve.generate`."
        )
    uvicorn, create_app = _import_server()
    listener = _listen(arguments.host, arguments.port)
    service = _service(arguments)
    address, port = listener.getsockname()[:2]
    host = f"[{address}]" if ":" in address else address
    _log.info("serving %s on http://%s:%d  (page at /, API at /v1)", service.name, host, port)
    if not address.startswith("127.") and address != "::1":
        _log.warning("there is no authentication: whoever reaches %s can use the model", address)
    config = uvicorn.Config(
        create_app(service), log_level="warning", timeout_graceful_shutdown=3, access_log=False
    )
    service.worker.start()
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has ended as asked
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.worker.stop()


def _service(arguments: argparse.Namespace) -> Any:
    """Load the model and allocate its cache."""
    import torch  # seconds to import: not for --help

    from megatron_eve.inference.cache import cache_bytes
    from megatron_eve.inference.engine import Engine, device_named
    from megatron_eve.inference.image_source import ImageSource
    from megatron_eve.inference.service import Limits, Service
    from megatron_eve.inference.worker import Worker

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    engine = Engine.load(arguments.folder, device=device_named(arguments.device), dtype=dtype)
    rows, tokens = arguments.batch_size, min(arguments.context_tokens, engine.context_tokens)
    taken = cache_bytes(engine.info.model, rows=rows, tokens=tokens, dtype=engine.dtype)
    _log.info("cache: %d requests x %d tokens = %.1f MiB", rows, tokens, taken / _MIB)
    return Service(
        name=arguments.model_name or arguments.folder.resolve().name,
        engine=engine,
        worker=Worker(engine, rows=rows, tokens=tokens, max_waiting=arguments.max_waiting),
        images=ImageSource(
            max_bytes=arguments.max_body_mib * _MIB,
            allow_url=arguments.allow_url,
            allow_path=arguments.allow_path,
        ),
        limits=Limits(
            body_bytes=arguments.max_body_mib * _MIB,
            image_pixels=arguments.max_image_pixels,
            images=arguments.max_images,
            new_tokens=arguments.max_new_tokens,
        ),
        resize_rule=arguments.resize_rule,
    )


def _import_server() -> tuple[Any, Any]:
    try:
        import uvicorn

        from megatron_eve.inference.http_app import create_app
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the server needs {error.name}, which is not installed; run "
            "`pip install -c constraints.txt -e '.[serve]'`."
        ) from error
    return uvicorn, create_app


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the weights are loaded: a taken port is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}); choose another --host or --port (0: any)."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.inference.serve",
        description="Serve a released model: OpenAI's API and a page to chat with an image.",
        epilog="example: python -m megatron_eve.inference.serve releases/eve-7b --port 8000",
    )
    add = parser.add_argument
    add("folder", type=Path, help="released Hugging Face folder")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    add("--port", type=int, default=8000, help="0: any free one (8000)")
    add("--model-name", help="what the API calls the model (the folder's name)")
    add("--device", help="cuda if there is one, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="that of the weights")
    add("--resize-rule", choices=("train", "eval"), help="of requests that name none")
    add("--batch-size", type=_positive, default=4, help="requests answered at a time (4)")
    add("--max-waiting", type=int, default=16, help="requests that may wait (16); more get 429")
    add("--context-tokens", type=_positive, default=8192, help="prompt and answer (8192)")
    add("--max-new-tokens", type=_positive, default=2048, help="limit of an answer (2048)")
    add("--max-images", type=_positive, default=8, help="limit of a conversation (8)")
    add("--max-image-pixels", type=_positive, default=50_000_000, help="of one image (50 million)")
    add("--max-body-mib", type=_positive, default=32, help="of one request (32)")
    add("--allow-url", action="store_true", help="fetch http(s) image URLs that clients send")
    add("--allow-path", type=Path, metavar="DIR", help="read image files below DIR for clients")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    end_with(main)
