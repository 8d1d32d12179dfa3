# SPDX-License-Identifier: Apache-2.0
"""Where a request's images may come from: its own data: URIs and, only if the server was started to, files below one
folder or addresses on the network.

A fetch lets a client see with the server's eyes: both ways are off unless asked for.
"""

import base64
import binascii
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megatron_eve.errors import DataError

_FETCH_TIMEOUT_S = 10
_SHOWN = 60
"""Characters of a URL that an error repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """The allowed sources, and how many bytes an image may have."""

    max_bytes: int
    allow_url: bool = False
    allow_path: Path | None = None  # files below this folder, symbolic links resolved

    def read(self, url: str) -> bytes:
        """The encoded image behind an `image_url`. Raises DataError."""
        scheme = url[:16].partition(":")[0].lower()  # not urlsplit: a data: URI may have megabytes
        if scheme == "data":
            return self._checked(_decode_data_uri(url, max_bytes=self.max_bytes), url)
        if scheme in ("http", "https"):
            if not self.allow_url:
                raise DataError(
                    f"{_short(url)} is on the network; this server fetches nothing (it was started without "
                    "--allow-url). Send the image itself as a data: URI."
                )
            return self._checked(_fetch(url, max_bytes=self.max_bytes), url)
        if self.allow_path is None:
            raise DataError(
                f"{_short(url)} is no data: URI; this server reads no files (it was started without --allow-path). "
                "Send data:image/png;base64,... or the like."
            )
        return self._read_file(url, self.allow_path)

    def _read_file(self, url: str, root: Path) -> bytes:
        try:
            path = unquote(urlsplit(url).path) if url.startswith("file:") else url
            resolved = (root / path).resolve()
            if not resolved.is_relative_to(root.resolve()) or not resolved.is_file():
                raise FileNotFoundError
            with resolved.open("rb") as file:
                data = file.read(self.max_bytes + 1)
        except (OSError, ValueError) as error:  # the client need not know which
            raise DataError(
                f"{_short(url)} is no file below the folder that this server may read."
            ) from error
        return self._checked(data, url)

    def _checked(self, data: bytes, url: str) -> bytes:
        if len(data) > self.max_bytes:
            raise DataError(
                f"{_short(url)} has more than {self.max_bytes:,} bytes; send a smaller file."
            )
        return data


def _decode_data_uri(url: str, *, max_bytes: int) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise DataError(f"{_short(url)} is not data:image/TYPE;base64,DATA.")
    if len(payload) > max_bytes * 4 // 3 + 4:
        return bytes(max_bytes + 1)  # too long in any case: not worth decoding
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{_short(url)} is not base64 ({error}).") from error


def _fetch(url: str, *, max_bytes: int) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "megatron-eve"})
        with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_S) as response:
            data: bytes = response.read(max_bytes + 1)
            return data
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{_short(url)} cannot be fetched ({error}).") from error


def _short(url: str) -> str:
    return repr(url if len(url) <= _SHOWN else url[:_SHOWN] + "...")
