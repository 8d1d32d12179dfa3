# SPDX-License-Identifier: Apache-2.0
"""The chat page in a real browser: an image dropped in, a question, the answer as it streams; and what goes wrong.

Needs the optional packages (pip install -c constraints.txt -e '.[test]') and a Chromium of the system (Debian:
apt-get install chromium)."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.inference.engine import Engine
from tests.inference.questions import picture, png
from tests.inference.test_serve import (  # noqa: F401  (server is a fixture)
    INSTALL,
    Server,
    expected,
    server,
    turn,
)

playwright = pytest.importorskip("playwright.sync_api", reason=INSTALL)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium found: apt-get install chromium, or set CHROMIUM to its path"
)
TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # Without its sandbox, which root cannot use; it visits this process' own server only.
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:  # noqa: F811
    """The page, open; at the end no script error and no request to anywhere else."""
    tab = browser.new_page(viewport={"width": 900, "height": 700})
    tab.set_default_timeout(TIMEOUT_MS)
    errors: list[str] = []
    visited: set[str] = set()
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: visited.add(request.url.split("/")[2]))
    tab.goto(f"http://127.0.0.1:{server.port}/")
    yield tab
    tab.close()
    assert errors == []
    assert {host for host in visited if host} == {f"127.0.0.1:{server.port}"}


def drop(page: Any, data: bytes, *, name: str, kind: str) -> None:
    """Drop a file anywhere on the page, as a mouse does."""
    transfer = page.evaluate_handle(
        """([base64, name, type]) => {
            const bytes = Uint8Array.from(atob(base64), c => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("main", event, {"dataTransfer": transfer})


def ask(page: Any, text: str, *, longest: int = 12) -> None:
    page.evaluate("longest => { document.getElementById('max_tokens').value = longest; }", longest)
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#stop", state="hidden")


def test_drop_an_image_and_chat(page: Any, engine: Engine, tmp_path: Path) -> None:
    playwright.expect(page.locator("#model")).to_have_text("eve")
    drop(page, png(picture(0)), name="0.png", kind="image/png")
    page.wait_for_selector("#thumbs img")
    ask(page, "What colour?")
    first = expected(engine, turn(engine, "What colour?", 0), max_new_tokens=12)
    assert page.inner_text(".assistant span") == first.strip()
    assert page.locator(".user img").count() == 1
    assert page.locator("#thumbs img").count() == 0
    assert "written in" in page.inner_text(".assistant .figures")
    ask(page, "How many?", longest=5)
    assert page.locator(".assistant").count() == 2  # the conversation so far went with it
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_pick_an_image_and_take_it_back(page: Any, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(picture(1)))
    page.set_input_files("#file", tmp_path / "1.png")
    page.click("#thumbs button")
    assert page.locator("#thumbs img").count() == 0


def test_what_the_server_refuses_is_shown_and_can_be_changed(page: Any) -> None:
    drop(page, b"no image", name="broken.png", kind="image/png")
    page.wait_for_selector("#thumbs img")
    ask(page, "What <is> this?")
    assert "image 0: the image cannot be decoded" in page.inner_text(".error")
    assert page.input_value("#text") == "What <is> this?"
    assert page.locator(".assistant").count() == 0
    page.click("#thumbs button")
    ask(page, "What is this?")
    assert page.locator(".assistant").count() == 1
    drop(page, b"text", name="notes.txt", kind="text/plain")
    playwright.expect(page.locator(".error").last).to_have_text("notes.txt is not an image.")
