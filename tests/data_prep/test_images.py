# SPDX-License-Identifier: Apache-2.0
"""Every image that passes has its original bytes (or a stated change), and the trainer decodes what is stored to the
very size that is stored. Its pixels: tests/inference/test_same_pixels.py."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.images import ImageLimits, Validation, check_image
from data_prep.quarantine import Rejected
from megatron_eve.data.read.image import ImageDecoder, ImageJob
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.errors import ConfigError
from tests.data_prep.pictures import encode, noise, with_orientation

FULL = ImageLimits(validate="full", max_pixels=1_000_000, max_aspect_ratio=20)
UPRIGHT = (40, 60)
TURNED = (60, 40)


def _animation(file_format: str) -> bytes:
    return encode(noise(), file_format, save_all=True, append_images=[noise(seed=1)])


KEPT = {
    "jpeg": (encode(noise(), "JPEG"), UPRIGHT),
    "progressive jpeg": (encode(noise(), "JPEG", progressive=True), UPRIGHT),
    "gray jpeg": (encode(noise(mode="L"), "JPEG"), UPRIGHT),
    "cmyk jpeg": (encode(noise(mode="CMYK"), "JPEG"), UPRIGHT),
    "jpeg turned": (with_orientation(noise(), "JPEG", 6), TURNED),
    "jpeg mirrored": (with_orientation(noise(), "JPEG", 2), UPRIGHT),
    "mpo": (_animation("MPO"), UPRIGHT),
    "png": (encode(noise(), "PNG"), UPRIGHT),
    "png rgba": (encode(noise(mode="RGBA"), "PNG"), UPRIGHT),
    "png palette": (encode(noise(mode="P"), "PNG"), UPRIGHT),
    "png 1 bit": (encode(noise(mode="1"), "PNG"), UPRIGHT),
    "png turned": (with_orientation(noise(), "PNG", 6), TURNED),
    "webp": (encode(noise(), "WEBP"), UPRIGHT),
    "webp lossless": (encode(noise(), "WEBP", lossless=True), UPRIGHT),
    "webp turned": (with_orientation(noise(), "WEBP", 6), TURNED),
    "bmp": (encode(noise(), "BMP"), UPRIGHT),
    "tiff": (encode(noise(), "TIFF"), UPRIGHT),
    "tiff turned": (with_orientation(noise(), "TIFF", 6), TURNED),
    "jpeg 2000": (encode(noise(), "JPEG2000"), UPRIGHT),
    "ppm": (encode(noise(), "PPM"), UPRIGHT),
}
SIXTEEN_BITS = np.random.default_rng(0).integers(0, 65_535, UPRIGHT, dtype=np.uint16)


CHANGED = {
    "gif_to_png": encode(noise(mode="P"), "GIF"),
    "avif_to_png": encode(noise(), "AVIF"),
    "16bit_to_png": encode(Image.fromarray(SIXTEEN_BITS), "PNG"),
    "first_frame_to_png": _animation("WEBP"),
    "ycbcr_pixels_to_png": encode(noise(mode="YCbCr"), "TIFF"),
}


def _trained_size(data: bytes) -> tuple[int, int]:
    """(height, width) of what the trainer's decoder makes of a row, where the row says what the build measured."""
    checked = check_image(data, limits=FULL)
    size = (checked.height, checked.width)
    (result,) = ImageDecoder(device="cpu").decode([ImageJob(checked.data, size, (32, 64))])
    assert not isinstance(result, SampleError), result
    return size


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("validate", ["header", "draft", "full"])
def test_readable_images_keep_their_bytes(name: str, validate: Validation) -> None:
    data, size = KEPT[name]
    limits = ImageLimits(validate=validate, max_pixels=1_000_000, max_aspect_ratio=20)
    checked = check_image(data, limits=limits)
    assert checked.data is data
    assert (checked.height, checked.width) == size
    assert checked.change is None


@pytest.mark.parametrize("name", KEPT)
def test_the_trainers_decoder_agrees_on_kept_images(name: str) -> None:
    data, size = KEPT[name]
    assert _trained_size(data) == size


@pytest.mark.parametrize("change", CHANGED)
def test_other_images_become_png(change: str) -> None:
    checked = check_image(CHANGED[change], limits=FULL)
    assert checked.change == change
    with Image.open(io.BytesIO(checked.data)) as image:
        assert image.format == "PNG"
        assert (image.height, image.width) == (checked.height, checked.width)
    assert _trained_size(checked.data) == (checked.height, checked.width)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    checked = check_image(CHANGED["16bit_to_png"], limits=FULL)
    pixels = np.asarray(Image.open(io.BytesIO(checked.data)))[..., 0]
    assert np.abs(pixels - SIXTEEN_BITS / 257.0).max() <= 0.5


def test_the_first_frame_is_the_one_that_is_kept() -> None:
    data = encode(noise(), "WEBP", save_all=True, append_images=[noise(seed=1)], lossless=True)
    checked = check_image(data, limits=FULL)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(checked.data))), np.asarray(noise()))


JPEG, PNG = encode(noise(), "JPEG"), encode(noise(), "PNG")
REFUSED = {
    "no bytes": (b"", "empty_image"),
    "html": (b"<html><body>404</body></html>", "unreadable_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unreadable_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image"),
    "header alone": (JPEG[:20], "unreadable_image"),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], "truncated_image"),
    "png cut in half": (PNG[: len(PNG) // 2], "truncated_image"),
    "png with a damaged middle": (PNG[:2000] + b"\0" * 200 + PNG[2200:], "corrupt_image"),
    "too many pixels": (encode(Image.new("1", (1001, 1000)), "PNG"), "too_many_pixels"),
    "bomb": (encode(Image.new("1", (20_000, 10_000)), "PNG"), "too_many_pixels"),
    "very long": (encode(Image.new("RGB", (2100, 100)), "PNG"), "aspect_ratio"),
    "float pixels": (encode(Image.new("F", (9, 9)), "TIFF"), "unsupported_pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_images_are_refused_with_a_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(Rejected) as caught:
        check_image(data, limits=FULL)
    assert caught.value.reason == reason
    assert caught.value.message


def test_a_draft_finds_a_cut_jpeg_and_a_header_does_not() -> None:
    cut = REFUSED["jpeg cut in half"][0]
    with pytest.raises(Rejected):
        check_image(cut, limits=ImageLimits(validate="draft", max_pixels=10**6, max_aspect_ratio=9))
    limits = ImageLimits(validate="header", max_pixels=10**6, max_aspect_ratio=9)
    assert check_image(cut, limits=limits).height == 40


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="--max-pixels"):
        ImageLimits(validate="full", max_pixels=0, max_aspect_ratio=9)
    with pytest.raises(ConfigError, match="--max-aspect-ratio"):
        ImageLimits(validate="full", max_pixels=9, max_aspect_ratio=0.5)
