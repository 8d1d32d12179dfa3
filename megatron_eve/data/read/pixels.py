# SPDX-License-Identifier: Apache-2.0
"""What an opened picture's pixels are: which way up, which colours, and how they are resized. Pillow and numpy alone.

The only place that decides it. The build of shards, the trainer and inference call it; a release carries the same text
as `pixels_eve.py`, for it stands alone (tests/data/test_pixels.py holds both together). So a question about a picture
and the training on it meet the same pixels, to the bit.

Comes in: an image as `PIL.Image.open` gives it, not yet decoded or already. Goes out: 8-bit RGB. Refused: pixels
whose white is not known, as 32-bit integers and floats. Orientation is Pillow's own reading of it (EXIF, XMP, a PNG's
raw profile), as `ImageOps.exif_transpose` turns; metadata that cannot be read turn nothing.
"""

import numpy as np
from PIL import Image

_ORIENTATION_TAG = 0x0112
_BITS_TAG, _PHOTOMETRIC_TAG = 258, 262  # of TIFF
_BLACK_IS_ZERO = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
_METADATA_BEHIND_PIXELS = ("PNG", "TIFF")
"""Formats whose orientation is known for certain only when the pixels are decoded: a PNG's text may stand behind them,
and Pillow turns a TIFF by itself while it loads."""


class UnsupportedPixelsError(ValueError):
    """Pixels that cannot become 8-bit RGB without a guess."""


def turn_of(image: Image.Image, *, exif_rotation: bool) -> Image.Transpose | None:
    """How the stored picture is to be turned; None: not at all. Decodes PNG and TIFF.

    `exif_rotation` False: as the official code, which looks at no metadata. A TIFF is turned in both, by Pillow."""
    if image.format in _METADATA_BEHIND_PIXELS:
        image.load()
    if not exif_rotation or image.format == "TIFF":
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow's parsers raise nearly anything on damaged metadata
        return None


def turned_size(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """(height, width) once it is turned."""
    width, height = image.size
    return (width, height) if turn in _SIDEWAYS else (height, width)


def turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """The picture the right way up."""
    return image if turn is None else image.transpose(turn)


def rgb_pixels(image: Image.Image) -> Image.Image:
    """8-bit RGB, as stored, not turned. Alpha is dropped, as the official `convert("RGB")` does; 16-bit grey is scaled,
    where `convert` would make white of all but the darkest.

    Raises UnsupportedPixelsError; whatever Pillow raises for a damaged file."""
    image.load()
    if image.mode in ("I", "F"):
        kind = "float" if image.mode == "F" else "integer"
        raise UnsupportedPixelsError(f"32-bit {kind} pixels; scale them to 8 bits yourself")
    if image.mode.startswith("I;16"):
        return _from_16_bits(image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise UnsupportedPixelsError(f"mode {image.mode} has no way to RGB: {error}") from error


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of as many as a TIFF says, to 8 bits, rounded."""
    bits = 16
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = int(tags.get(_BITS_TAG, (bits,))[0])
        if tags.get(_PHOTOMETRIC_TAG, _BLACK_IS_ZERO) != _BLACK_IS_ZERO:
            raise UnsupportedPixelsError(
                f"grey TIFF of {bits} bits in which 0 is white, which Pillow shows as a negative"
            )
    white = 2**bits - 1
    pixels = np.asarray(image).astype(np.uint32)
    if pixels.size and int(pixels.max()) > white:
        raise UnsupportedPixelsError(f"grey of {bits} bits with values up to {pixels.max()}")
    return Image.fromarray(((pixels * 255 + white // 2) // white).astype(np.uint8))


def resized(rgb: Image.Image, *, size: tuple[int, int]) -> Image.Image:
    """`rgb` at `size` (height, width): Pillow's bicubic, which rounds and clips between its two passes. Other
    implementations clip once, at the end, and are up to 28 of 255 away where black meets white."""
    height, width = size
    return rgb.resize((width, height), Image.Resampling.BICUBIC)
