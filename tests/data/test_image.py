# SPDX-License-Identifier: Apache-2.0
"""The trainer's decoder: DALI's JPEG equals Pillow's to the bit, and a bad image spoils nothing but itself. What build,
inference and release see of the same files: tests/inference/test_same_pixels.py."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.read.image import (
    ImageDecoder,
    ImageJob,
    decode_reference,
    image_size,
    open_image,
)
from megatron_eve.data.read.image_size import eval_size, train_size
from megatron_eve.data.read.quarantine import SampleError
from tests.data.conftest import encode_image, smooth_image
from tests.support.hard_pictures import documents


@pytest.fixture(scope="module")
def decoder() -> ImageDecoder:
    return ImageDecoder(device="cpu", max_batch=8)


def job_of(data: bytes, *, target: tuple[int, int] = (64, 96)) -> ImageJob:
    return ImageJob(data=data, source_size=image_size(data), target_size=target)


def pixels(result: NDArray[np.uint8] | SampleError) -> NDArray[np.int64]:
    assert not isinstance(result, SampleError), result
    return result.astype(np.int64)


JPEG_FORMS: dict[str, dict[str, object]] = {
    "4:2:0": {"quality": 90},
    "4:2:2": {"quality": 75, "subsampling": 1},
    "4:4:4": {"quality": 95, "subsampling": 0},
    "progressive": {"quality": 85, "progressive": True},
    "coarse": {"quality": 20},
    "RGB": {"keep_rgb": True},
    "restarts": {"restart_marker_rows": 1},
}


@pytest.mark.parametrize("form", JPEG_FORMS)
def test_dali_decodes_jpeg_to_pillows_pixels(decoder: ImageDecoder, form: str) -> None:
    """Unscaled: photographs, pages, line art and a screenshot, in every chroma subsampling, in colour and in grey."""
    images = [
        *documents().values(),
        smooth_image(61, 203, seed=1),
        documents()["page"].convert("L"),
    ]
    files = [encode_image(image, **JPEG_FORMS[form]) for image in images]
    results = decoder.decode([job_of(data, target=image_size(data)) for data in files])
    for data, result in zip(files, results, strict=True):
        with open_image(data) as image:
            assert np.array_equal(pixels(result), np.asarray(image.convert("RGB")))


def test_dali_is_what_decodes_jpeg(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison above is not of Pillow with itself."""
    given: list[int] = []
    run = ImageDecoder._run
    monkeypatch.setattr(
        ImageDecoder, "_run", lambda self, jobs: given.append(len(jobs)) or run(self, jobs)
    )
    files = [encode_image(smooth_image(50, 60, seed=1), format=form) for form in ("JPEG", "PNG")]
    decoder.decode([job_of(data) for data in files])
    assert given == [1]


def test_resize_is_pillows_bicubic(decoder: ImageDecoder) -> None:
    jobs = []
    for seed, (height, width) in enumerate([(480, 640), (700, 333), (50, 90), (1000, 400)]):
        image = smooth_image(height, width, seed=seed)
        for data in (encode_image(image, quality=90), encode_image(image, format="PNG")):
            jobs.append(job_of(data, target=train_size(height, width, edge=300)))
            jobs.append(job_of(data, target=eval_size(height, width, edge=500)))
    for job, result in zip(jobs, decoder.decode(jobs), strict=True):
        height, width = job.target_size
        with open_image(job.data) as image:
            expected = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        assert np.array_equal(pixels(result), np.asarray(expected))


@pytest.mark.parametrize("orientation", list(range(1, 9)))
def test_exif_rotation(decoder: ImageDecoder, orientation: int) -> None:
    image = smooth_image(120, 200, seed=3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode_image(image, exif=exif)
    assert image_size(data) == ((200, 120) if orientation >= 5 else (120, 200))
    (result,) = decoder.decode([job_of(data)])
    expected = decode_reference(data, target_size=(64, 96))
    assert np.array_equal(pixels(result), expected)


def test_every_colour_mode_becomes_rgb(decoder: ImageDecoder) -> None:
    image = smooth_image(90, 120, seed=4)
    files = [
        encode_image(image.convert("L")),
        encode_image(image.convert("CMYK")),
        encode_image(image.convert("RGBA"), format="PNG"),
        encode_image(image.convert("P"), format="PNG"),
        encode_image(image, format="WEBP", quality=90),
        encode_image(image.convert("P"), format="GIF"),
    ]
    results = decoder.decode([job_of(data) for data in files])
    for data, result in zip(files, results, strict=True):
        expected = decode_reference(data, target_size=(64, 96))
        assert np.array_equal(pixels(result), expected)


def bad_files() -> dict[str, bytes]:
    jpeg = encode_image(smooth_image(200, 200, seed=5), quality=90)
    png = encode_image(smooth_image(200, 200, seed=5), format="PNG")
    return {
        "truncated JPEG": jpeg[: len(jpeg) // 2],
        "truncated PNG": png[: len(png) // 2],
        "empty file": b"",
        "not an image": b"<html>404 Not Found</html>",
    }


def test_bad_images_spoil_nothing_but_themselves(decoder: ImageDecoder) -> None:
    good = [encode_image(smooth_image(100 + 8 * i, 140, seed=i)) for i in range(12)]
    expected = [decode_reference(data, target_size=(64, 96)).astype(np.int64) for data in good]
    jobs = [job_of(data) for data in good]
    bad_places = {}
    for place, (name, data) in zip((0, 3, 4, 11), bad_files().items(), strict=True):
        bad_places[place] = name
        jobs.insert(place, ImageJob(data=data, source_size=(200, 200), target_size=(64, 96)))
    results = decoder.decode(jobs)
    assert len(results) == 16
    survivors = [pixels(r) for i, r in enumerate(results) if i not in bad_places]
    for result, reference in zip(survivors, expected, strict=True):
        assert np.array_equal(result, reference)
    for place, name in bad_places.items():
        result = results[place]
        assert isinstance(result, SampleError), name
        assert result.reason == "undecodable", name
        assert "bytes starting" in result.message


def test_batch_after_a_failure_is_right_and_larger_than_max_batch(decoder: ImageDecoder) -> None:
    truncated = bad_files()["truncated JPEG"]
    decoder.decode([ImageJob(data=truncated, source_size=(200, 200), target_size=(64, 96))])
    data = encode_image(smooth_image(100, 100, seed=1))
    results = decoder.decode([job_of(data, target=(32, 32 + 32 * i)) for i in range(20)])
    assert [pixels(r).shape for r in results] == [(32, 32 + 32 * i, 3) for i in range(20)]


def test_file_that_is_not_what_the_row_says_is_refused(decoder: ImageDecoder) -> None:
    data = encode_image(smooth_image(100, 120, seed=1))
    (result,) = decoder.decode([ImageJob(data=data, source_size=(120, 100), target_size=(32, 32))])
    assert isinstance(result, SampleError)
    assert str(result) == "size_mismatch: the file is 100 x 120, the shard's row says 120 x 100"


def test_bomb_is_refused_by_its_header() -> None:
    bomb = encode_image(Image.new("1", (12_000, 12_000)), format="PNG")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(SampleError) as error:
        image_size(bomb)
    assert error.value.reason == "too_many_pixels"
    assert len(bomb) < 100_000


@pytest.mark.gpu
def test_gpu_decodes_like_the_cpu(decoder: ImageDecoder) -> None:
    """nvJPEG and libjpeg-turbo differ by rounding; with nearest chroma upsampling the mean would exceed 1."""
    jobs = []
    for seed in range(8):
        image = smooth_image(300 + 40 * seed, 400, seed=seed)
        jobs.append(job_of(encode_image(image, quality=90), target=(256, 320)))
    jobs.append(ImageJob(bad_files()["truncated JPEG"], (200, 200), (64, 96)))
    on_cpu, on_gpu = decoder.decode(jobs), ImageDecoder(device="cuda").decode(jobs)
    for found, expected in zip(on_gpu[:-1], on_cpu[:-1], strict=True):
        assert np.abs(pixels(found) - pixels(expected)).mean() < 1.0
    assert isinstance(on_gpu[-1], SampleError)


def test_no_images_at_all(decoder: ImageDecoder) -> None:
    assert decoder.decode([]) == []
