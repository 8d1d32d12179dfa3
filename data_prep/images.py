# SPDX-License-Identifier: Apache-2.0
"""Checking encoded images and, only where the trainer's decoder (DALI) cannot read them as they are, re-encoding them.

In: the bytes of a file. Out: the bytes to store (the very same ones unless `change` says otherwise) and the size after
EXIF rotation, which is what DALI will deliver. Refused with a reason of quarantine.REASONS: everything that would not
decode in training.

Sources: the formats that DALI 2.4 reads bit-equal to PIL were measured file by file (tests/data_prep/test_images.py
repeats it); it fails on GIF and AVIF and on some WebP files with EXIF, and reads a JPEG with a damaged middle as
garbage without an error, so that such damage must be found here.
"""

import io
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import DecompressionBombError

from data_prep.quarantine import Rejected
from megatron_eve.errors import ConfigError

Validation = Literal["header", "draft", "full"]
"""header: only size and format. draft: decode everything, JPEG at 1/8 scale (finds what a full decode finds, about
twice as fast). full: decode every pixel."""

READABLE_FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "JPEG2000", "PPM"),
    *("GIF", "AVIF", "ICO", "TGA"),
)
"""Formats that are opened at all: those whose PIL decoder runs no outside program such as Ghostscript."""

STORED_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"})
STORED_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK"})
PIL_PIXEL_LIMIT = 178_956_970
"""PIL refuses images above this (2 x Image.MAX_IMAGE_PIXELS)."""

ORIENTATION_TAG = 0x0112
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What an image may be, and how closely it is looked at."""

    validate: Validation
    max_pixels: int
    max_aspect_ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PIL_PIXEL_LIMIT:
            raise ConfigError(
                f"--max-pixels {self.max_pixels} is outside 1..{PIL_PIXEL_LIMIT} (PIL's own limit)."
            )
        if self.max_aspect_ratio < 1:
            raise ConfigError(f"--max-aspect-ratio {self.max_aspect_ratio} is below 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedImage:
    """An image that DALI can read. `change` is None when `data` are the original bytes."""

    data: bytes
    height: int  # after EXIF rotation
    width: int
    change: str | None


def check_image(data: bytes, *, limits: ImageLimits) -> CheckedImage:
    """Look at one encoded image. Raises: Rejected with the reason and what was found."""
    if not data:
        raise Rejected("empty_image", "the file has 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PIL warns of odd metadata and large sizes; both are decided here
        image = _open(data)
        _check_size(image, limits=limits)
        change = _needed_change(image, data)
        if change is not None:
            return _reencode(image, change=change)
        height, width = _oriented_size(image)
        if limits.validate != "header":
            if image.format == "PNG":
                _check_png_chunks(data)
            _decode(image, draft=limits.validate == "draft")
    return CheckedImage(data=data, height=height, width=width, change=None)


def _open(data: bytes) -> Image.Image:
    Image.init()  # registers all formats; without it PIL knows five, and others raise KeyError
    formats = [name for name in READABLE_FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
    except Exception as error:  # damaged headers make PIL's parsers raise nearly anything
        raise Rejected(
            "unreadable_image", f"{type(error).__name__}; first bytes {data[:12]!r}"
        ) from error


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
    """Why the image must be re-encoded as PNG, or None if DALI reads it as it is."""
    if image.format not in STORED_FORMATS:
        return f"{str(image.format).lower()}_to_png"
    if _bits_per_channel(image, data) == 16:
        return "16bit_to_png"
    if image.mode not in STORED_MODES:
        return f"{image.mode.lower()}_pixels_to_png"
    if image.format != "MPO" and _num_frames(image) > 1:
        return "first_frame_to_png"
    if image.format == "WEBP" and _has_misplaced_exif(data):
        return "webp_with_odd_chunk_to_png"
    return None


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """16 for images of 16 bits, of which PIL reads some as 8-bit RGB without saying so; else 8."""
    if image.format == "PNG" and data[12:16] == b"IHDR":
        return 16 if data[24] == 16 else 8
    raw_modes = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return 16 if image.mode.startswith("I;16") or any(";16" in mode for mode in raw_modes) else 8


def _has_misplaced_exif(data: bytes) -> bool:
    """Whether an EXIF chunk of a WebP file comes after a chunk of odd length: DALI 2.4 looks for it one byte too early
    (it forgets the padding byte) and refuses the file."""
    position, shifted = 12, False
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if shifted and data[position : position + 4] == b"EXIF":
            return True
        shifted = shifted or size % 2 == 1
        position += 8 + size + size % 2
    return False


def _num_frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception as error:  # a damaged directory of frames
        raise Rejected("corrupt_image", f"the list of frames is damaged: {error}") from error


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) after EXIF rotation. PIL has turned TIFF already when it opens; JPEG 2000 carries no EXIF."""
    width, height = image.size
    if image.format in ("JPEG", "MPO", "PNG", "WEBP"):
        try:
            orientation = image.getexif().get(ORIENTATION_TAG, 1)
        except Exception:  # damaged EXIF counts as none, for DALI as well
            orientation = 1
        if orientation in TRANSPOSED_ORIENTATIONS:
            height, width = width, height
    return height, width


def _decode(image: Image.Image, *, draft: bool) -> None:
    if draft and image.format in ("JPEG", "MPO"):
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    try:
        image.load()
    except DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from error
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


def _reencode(image: Image.Image, *, change: str) -> CheckedImage:
    """The first frame, upright, as 8-bit RGB PNG."""
    _decode(image, draft=False)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        pixels = np.asarray(upright).astype(np.uint32)
        upright = Image.fromarray(((pixels * 255 + 32_767) // 65_535).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise Rejected(
            "unsupported_pixels",
            f"{image.format} with 32-bit {'float' if upright.mode == 'F' else 'integer'} pixels; "
            "scale it to 8 bits yourself",
        )
    try:
        rgb = upright.convert("RGB")
    except ValueError as error:
        raise Rejected(
            "unsupported_pixels", f"{image.format}, mode {image.mode}: {error}"
        ) from error
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG")
    return CheckedImage(data=buffer.getvalue(), height=rgb.height, width=rgb.width, change=change)
