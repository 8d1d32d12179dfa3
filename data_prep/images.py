# SPDX-License-Identifier: Apache-2.0
"""Checks encoded images, and re-encodes those that are no plain picture of 8 bits.

In: the bytes of a file. Out: the bytes to store (the very same unless `change` is set) and the size that the trainer
will find: its own code (megatron_eve/data/read/pixels.py) decides which way up a picture is, what its colours are and
which has none. Refused with a reason of quarantine.REASONS: everything that would not decode in training. The trainer's
decoder reads a JPEG with a damaged middle as garbage without an error, so such damage must be found here.
"""

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from PIL.Image import DecompressionBombError

from megatron_eve.data.read.image import open_image
from megatron_eve.data.read.pixels import (
    UnsupportedPixelsError,
    rgb_pixels,
    turn_of,
    turned,
    turned_size,
)
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.errors import ConfigError

from .quarantine import Rejected

Validation = Literal["header", "draft", "full"]
"""header: only size and format. draft: decode everything, JPEG at 1/8 scale (finds what a full decode finds, about
twice as fast). full: decode every pixel. PNG and TIFF are decoded by all three: to know which way up they are."""

STORED_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"})
STORED_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK"})
PIL_PIXEL_LIMIT = 178_956_970
"""PIL refuses images above this (2 x Image.MAX_IMAGE_PIXELS)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an image may be, and how thoroughly it is checked."""

    validate: Validation
    max_pixels: int
    max_aspect_ratio: float
    exif_rotation: bool = True  # `data.exif_rotation` of the runs that will read the shards

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PIL_PIXEL_LIMIT:
            raise ConfigError(
                f"--max-pixels {self.max_pixels} is outside 1..{PIL_PIXEL_LIMIT} (PIL's own limit)."
            )
        if self.max_aspect_ratio < 1:
            raise ConfigError(f"--max-aspect-ratio {self.max_aspect_ratio} is below 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedImage:
    """An image that training can read. `change` is None when `data` are the original bytes."""

    data: bytes
    height: int  # as it is trained on, turned or not
    width: int
    change: str | None


def check_image(data: bytes, *, limits: ImageLimits) -> CheckedImage:
    """Check one encoded image. Raises: Rejected with the reason and what was found."""
    if not data:
        raise Rejected("empty_image", "the file has 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PIL warns of odd metadata and large sizes; both are decided here
        image = _open(data)
        _check_size(image, limits=limits)
        change = _needed_change(image, data)
        if limits.validate != "header" and image.format == "PNG":
            _check_png_chunks(data)
        with _decoding():
            turn = turn_of(image, exif_rotation=limits.exif_rotation)
        if change is not None:
            return _reencode(image, turn=turn, change=change, limits=limits)
        height, width = turned_size(image, turn)
        if limits.validate != "header":
            _decode(image, draft=limits.validate == "draft")
    return CheckedImage(data=data, height=height, width=width, change=None)


def _open(data: bytes) -> Image.Image:
    try:
        return open_image(data)
    except SampleError as error:
        reason = "unreadable_image" if error.reason == "undecodable" else error.reason
        raise Rejected(reason, error.message) from error


def _check_size(image: Image.Image, *, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise Rejected(
            "too_many_pixels",
            f"{width} x {height} = {width * height:,} pixels, limit {limits.max_pixels:,}",
        )
    ratio = max(width, height) / max(1, min(width, height))
    if ratio > limits.max_aspect_ratio:
        raise Rejected(
            "aspect_ratio",
            f"{width} x {height}, ratio {ratio:.1f}, limit {limits.max_aspect_ratio:g}",
        )


def _needed_change(image: Image.Image, data: bytes) -> str | None:
    """Why the image is re-encoded as PNG, or None if its bytes are stored as they are."""
    if image.format not in STORED_FORMATS:
        return f"{str(image.format).lower()}_to_png"
    if _bits_per_channel(image, data) == 16:
        return "16bit_to_png"
    if image.mode not in STORED_MODES:
        return f"{image.mode.lower()}_pixels_to_png"
    if image.format != "MPO" and _num_frames(image) > 1:
        return "first_frame_to_png"
    return None


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """16 for images of 16 bits, of which PIL reads some as 8-bit RGB without saying so; else 8."""
    if image.format == "PNG" and data[12:16] == b"IHDR":
        return 16 if data[24] == 16 else 8
    raw_modes = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return 16 if image.mode.startswith("I;16") or any(";16" in mode for mode in raw_modes) else 8


def _num_frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # a damaged directory of frames
        raise Rejected("corrupt_image", f"the list of frames is damaged: {error}") from error


def _decode(image: Image.Image, *, draft: bool) -> None:
    """Decode every pixel, so that damage is found; after a full decode it can become RGB as well."""
    if draft and image.format in ("JPEG", "MPO"):
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    with _decoding():
        rgb_pixels(image)


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn what Pillow raises on the way to pixels into the reason for quarantine."""
    try:
        yield
    except DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
    except UnsupportedPixelsError as error:
        raise Rejected("unsupported_pixels", str(error)) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        text = str(error) or type(error).__name__
        reason = "truncated_image" if "truncated" in text.lower() else "corrupt_image"
        raise Rejected(reason, text[:200]) from error


def _check_png_chunks(data: bytes) -> None:
    """Compare every chunk with its checksum; PIL does not do it for pixels, and shows damage as noise."""
    position = 8
    while position + 12 <= len(data) and data[position + 4 : position + 8] != b"IEND":
        end = position + 8 + int.from_bytes(data[position : position + 4])
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            if end + 4 > len(data):
                raise Rejected(
                    "truncated_image", f"{len(data):,} bytes, a chunk ends at {end + 4:,}"
                )
            name = data[position + 4 : position + 8].decode("latin-1")
            raise Rejected("corrupt_image", f"wrong checksum of chunk {name} at byte {position:,}")
        position = end + 4


def _reencode(
    image: Image.Image, *, turn: Image.Transpose | None, change: str, limits: ImageLimits
) -> CheckedImage:
    """The first frame, turned, as 8-bit RGB PNG."""
    with _decoding():
        rgb = turned(rgb_pixels(image), turn)
    _check_size(rgb, limits=limits)  # an icon's header says nothing of the picture inside
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG")
    return CheckedImage(data=buffer.getvalue(), height=rgb.height, width=rgb.width, change=change)
