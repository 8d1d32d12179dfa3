# SPDX-License-Identifier: Apache-2.0
"""Images of a request: data: URIs always, files and addresses only where the server was told so."""

import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_eve.errors import DataError
from megatron_eve.inference.image_source import ImageSource

DATA = bytes(range(90))
URI = "data:image/png;base64," + base64.b64encode(DATA).decode()


def test_data_uris() -> None:
    assert ImageSource(max_bytes=90).read(URI) == DATA
    assert ImageSource(max_bytes=90).read(URI.replace("data:image/png", "DATA:")) == DATA
    for source, uri, message in (
        (ImageSource(max_bytes=89), URI, r"has more than 89 bytes"),
        (ImageSource(max_bytes=9), URI, r"has more than 9 bytes"),
        (ImageSource(max_bytes=90), "data:image/png;base64,AA=A", r"is not base64"),
        (ImageSource(max_bytes=90), "data:image/png;base64,é", r"is not base64"),
        (ImageSource(max_bytes=90), "data:image/png,AA", r"is not data:image/TYPE;base64,DATA"),
        (ImageSource(max_bytes=90), "data:image/png;base64", r"is not data:image/TYPE"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            source.read(uri)
        assert len(str(caught.value)) < 200  # an image is not repeated in an error


@pytest.mark.parametrize("url", ["/etc/hosts", "file:///etc/hosts", "x.png", "ftp://h/x", "", "\n"])
def test_no_file_is_read_by_default(url: str) -> None:
    with pytest.raises(DataError, match=r"started without --allow-path"):
        ImageSource(max_bytes=90).read(url)
    with pytest.raises(DataError, match=r"started without --allow-path"):
        ImageSource(max_bytes=90, allow_url=True).read(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "HTTPS://example.org/x.png"])
def test_nothing_is_fetched_by_default(url: str, tmp_path: Path) -> None:
    for source in (ImageSource(max_bytes=90), ImageSource(max_bytes=90, allow_path=tmp_path)):
        with pytest.raises(DataError, match=r"started without --allow-url"):
            source.read(url)


def test_files_below_the_folder_and_no_others(tmp_path: Path) -> None:
    root = tmp_path / "open"
    (root / "sub").mkdir(parents=True)
    inside, outside = root / "sub/a b.png", tmp_path / "secret.png"
    inside.write_bytes(DATA)
    outside.write_bytes(DATA)
    (root / "link.png").symlink_to(outside)
    source = ImageSource(max_bytes=90, allow_path=root)
    for url in ("sub/a b.png", str(inside), inside.as_uri()):
        assert source.read(url) == DATA
    for url in (
        "../secret.png",
        "link.png",
        str(outside),
        outside.as_uri(),
        "sub",
        "no.png",
        "a\0b",
        "a" * 5000,
    ):
        with pytest.raises(DataError, match=r"is no file below the folder"):
            source.read(url)
    with pytest.raises(DataError, match=r"has more than 50 bytes"):
        ImageSource(max_bytes=50, allow_path=root).read("sub/a b.png")


@pytest.fixture
def address() -> Iterator[str]:
    """A server on this machine that has /x.png, endless /long, /odd, which is no HTTP, and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/odd":
                self.wfile.write(b"what?\r\n\r\n")
                return
            self.send_response(200 if self.path in ("/x.png", "/long") else 404)
            self.end_headers()
            self.wfile.write(DATA * (1000 if self.path == "/long" else 1))

        def log_message(self, *_: object) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses_if_allowed(address: str) -> None:
    source = ImageSource(max_bytes=90, allow_url=True)
    assert source.read(f"{address}/x.png") == DATA
    with pytest.raises(DataError, match=r"has more than 90 bytes"):
        source.read(f"{address}/long")
    odd = (f"{address}/odd", "http://a b/x.png", "http://[::1", "http://\0")
    for url in (f"{address}/no.png", "http://127.0.0.1:1/x.png", "http://", *odd):
        with pytest.raises(DataError, match=r"cannot be fetched"):
            source.read(url)
