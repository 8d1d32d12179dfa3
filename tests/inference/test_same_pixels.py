# SPDX-License-Identifier: Apache-2.0
"""One picture, four readers: the build of shards, the trainer, the server and the release see the same pixels, those of
Pillow, or all of them refuse it."""

import dataclasses
import io
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from checkpoints_convert.hf.processing_eve import EVEImageProcessor
from data_prep.images import ImageLimits, Validation, check_image
from data_prep.quarantine import Rejected
from megatron_eve.data.read.image import ImageDecoder, ImageJob
from megatron_eve.data.read.image_size import train_size
from megatron_eve.data.read.quarantine import SampleError
from megatron_eve.errors import DataError
from megatron_eve.inference.prompts import prepare_image
from megatron_eve.inference.release import ImageRules
from tests.support.hard_pictures import damaged, documents, encode, rare, turned
from tests.support.patches import unpatchify
from tests.support.tiny import tiny_model

EDGE = 256
"""M of the resize rule: the documents are shrunk by 2 and more, the small files keep about their size."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Readers:
    """The four, with one choice of `exif_rotation`."""

    exif_rotation: bool
    decoder: ImageDecoder

    def trained(self, data: bytes, *, validate: Validation = "full") -> Pixels:
        """Through the build. Raises Rejected, SampleError."""
        limits = ImageLimits(
            validate=validate,
            max_pixels=120_000_000,
            max_aspect_ratio=100,
            exif_rotation=self.exif_rotation,
        )
        stored = check_image(data, limits=limits)
        size = (stored.height, stored.width)
        (result,) = self.decoder.decode([ImageJob(stored.data, size, train_size(*size, edge=EDGE))])
        if isinstance(result, SampleError):
            raise result
        return result

    def served(self, data: bytes) -> Pixels:
        """Raises DataError."""
        grey = (0.5, 0.5, 0.5)
        rules = ImageRules(
            edge=EDGE, resize_rule="train", mean=grey, std=grey, exif_rotation=self.exif_rotation
        )
        found = prepare_image(data, model=MODEL, rules=rules)
        return unpatchify(
            found.patches,
            rows=found.rows,
            patch_stride=MODEL.patch_stride,
            dense_stride=MODEL.dense_stride,
        )

    def released(self, data: bytes) -> Pixels:
        """Raises whatever Pillow does."""
        processor = EVEImageProcessor(max_size=EDGE, exif_rotation=self.exif_rotation)
        return np.array(processor.resize(Image.open(io.BytesIO(data))))


MODEL = dataclasses.replace(tiny_model(), patch_stride=16)


@pytest.fixture(scope="module")
def turning() -> Readers:
    return Readers(exif_rotation=True, decoder=ImageDecoder(device="cpu"))


@pytest.fixture(scope="module")
def official() -> Readers:
    decoder = ImageDecoder(device="cpu", exif_rotation=False)
    return Readers(exif_rotation=False, decoder=decoder)


def by_pillow(data: bytes, *, exif_rotation: bool = True) -> Pixels:
    """As the official code reads and resizes, after Pillow's own turn where it is wanted."""
    image = Image.open(io.BytesIO(data))
    try:
        image = ImageOps.exif_transpose(image) if exif_rotation else image
    except Exception:  # metadata that Pillow cannot read turn nothing
        image = Image.open(io.BytesIO(data))
    image = image.convert("RGB")
    height, width = train_size(image.height, image.width, edge=EDGE)
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC))


def assert_all_equal(readers: Readers, data: bytes, expected: Pixels) -> None:
    for read in (readers.trained, readers.served, readers.released):
        found = read(data)
        assert found.shape == expected.shape, read.__name__
        assert np.array_equal(found, expected), read.__name__


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("name", documents())
def test_documents(turning: Readers, name: str, form: str) -> None:
    data = encode(documents()[name], form, **({"quality": 85} if form in ("JPEG", "WEBP") else {}))
    assert_all_equal(turning, data, by_pillow(data))


def test_a_resize_that_clips_once_would_be_noticed() -> None:
    """Pillow clips between its two passes: the same bicubic without it, as DALI's, shows on every page."""
    for name in ("page", "page, black and white", "line art", "screenshot"):
        image = documents()[name].convert("L")
        size = (image.width // 2 - 3, image.height // 2 - 3)
        floats = Image.fromarray(np.asarray(image, np.float32)).resize(size, Image.BICUBIC)
        once = np.clip(np.rint(np.asarray(floats)), 0, 255)
        twice = np.asarray(image.resize(size, Image.BICUBIC), np.float32)
        assert np.abs(once - twice).max() > 5, name


@pytest.mark.parametrize("name", turned())
def test_orientation(turning: Readers, name: str) -> None:
    data = turned()[name]
    assert_all_equal(turning, data, by_pillow(data))


@pytest.mark.parametrize("name", turned())
def test_orientation_is_not_looked_at_where_it_is_not_wanted(official: Readers, name: str) -> None:
    data = turned()[name]
    assert_all_equal(official, data, by_pillow(data, exif_rotation=False))


def test_the_pictures_are_turned_at_all() -> None:
    """So that a reader which never turns does not pass."""
    files = turned()
    straight = by_pillow(files["exif 1"])
    sideways = [name for name, data in files.items() if by_pillow(data).shape != straight.shape]
    assert len(sideways) > 20
    for turn in range(2, 9):
        assert not np.array_equal(by_pillow(files[f"exif {turn}"]), straight)


UNKNOWN_WHITE = {"16-bit TIFF, white is zero", "float TIFF", "32-bit TIFF", "16-bit PGM"}
"""Refused by all: no 8-bit form without a guess."""
SCALED = {"12-bit TIFF", "16-bit TIFF", "16-bit PNG", "16-bit JPEG 2000"}
"""Grey of more than 8 bits: scaled, where Pillow's `convert` cuts off."""
SERVED_LESS = {"icon"}
"""The server takes fewer formats than the build."""


@pytest.mark.parametrize("name", sorted(rare().keys() - UNKNOWN_WHITE - SCALED))
def test_rare_files(turning: Readers, name: str) -> None:
    data = rare()[name]
    expected = by_pillow(data)
    assert np.array_equal(turning.trained(data), expected)
    assert np.array_equal(turning.released(data), expected)
    if name not in SERVED_LESS:
        assert np.array_equal(turning.served(data), expected)


@pytest.mark.parametrize("name", sorted(UNKNOWN_WHITE))
@pytest.mark.parametrize("validate", ["header", "draft", "full"])
def test_pixels_without_a_known_white(turning: Readers, name: str, validate: Validation) -> None:
    data = rare()[name]
    with pytest.raises(Rejected) as rejected:
        turning.trained(data, validate=validate)
    assert rejected.value.reason == "unsupported_pixels"
    with pytest.raises(DataError, match="UnsupportedPixelsError"):
        turning.served(data)
    with pytest.raises(ValueError, match="bit"):
        turning.released(data)
    image = Image.open(io.BytesIO(data))
    size = (image.height, image.width)
    (unchecked,) = turning.decoder.decode([ImageJob(data, size, size)])
    assert isinstance(unchecked, SampleError), "shards that another builder made"


@pytest.mark.parametrize("name", sorted(SCALED))
def test_more_than_8_bits_are_scaled(turning: Readers, name: str) -> None:
    data = rare()[name]
    image = Image.open(io.BytesIO(data))
    levels = np.asarray(image).astype(np.float64)
    white = 4095 if name == "12-bit TIFF" else 65535
    grey = Image.fromarray(np.floor(levels / white * 255 + 0.5).astype(np.uint8)).convert("RGB")
    height, width = train_size(image.height, image.width, edge=EDGE)
    expected = np.array(grey.resize((width, height), Image.BICUBIC))
    assert expected.max() == 255 or name.startswith("16-bit")
    assert_all_equal(turning, data, expected)


@pytest.mark.parametrize("name", damaged())
def test_damaged_files_are_refused_by_all(turning: Readers, name: str) -> None:
    data = damaged()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for validate in ("draft", "full"):
            with pytest.raises(Rejected):
                turning.trained(data, validate=validate)
        with pytest.raises(DataError):
            turning.served(data)
        (unchecked,) = turning.decoder.decode([ImageJob(data, (120, 160), (64, 64))])
    assert isinstance(unchecked, SampleError)


def test_random_damage_is_judged_alike(turning: Readers) -> None:
    """What the build lets through, training and inference decode to the same pixels."""
    random, files = np.random.default_rng(0), documents()
    whole = [
        encode(files[name].crop((0, 0, 96, 64)), form)
        for name in files
        for form in ("JPEG", "PNG", "WEBP")
    ]
    passed = 0
    for number in range(150):
        data = bytearray(whole[number % len(whole)])
        places = random.integers(30, len(data), 1 + number % 3)
        data[int(places[0]) :] = data[int(places[0]) + number % 2 :]  # every second loses a byte
        for place in places[1:]:
            data[min(int(place), len(data) - 1)] ^= 1 << number % 8
        damaged_file = bytes(data)
        try:
            seen_in_training = turning.trained(damaged_file)
        except Rejected:
            continue
        passed += 1
        assert np.array_equal(turning.served(damaged_file), seen_in_training), number
        assert np.array_equal(turning.released(damaged_file), seen_in_training), number
    assert passed > 20
