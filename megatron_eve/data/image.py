# SPDX-License-Identifier: Apache-2.0
"""Encoded images to resized RGB pixels, by NVIDIA DALI on the CPU or the GPU; a bad image spoils nothing but itself.

Comes in: encoded bytes (JPEG, PNG, WebP, ...), the size that the shard's row gives, the size to resize to. Goes out,
per image: uint8 pixels [H, W, 3] on the host, or a `SampleError` (undecodable, size_mismatch, too_many_pixels).
DALI's INTERP_CUBIC with antialias=True is Pillow's bicubic: mean difference < 0.25 of 255, 99.9% within 1
(tests/data/test_image.py). `jpeg_fancy_upsampling` matters on the GPU, where nvJPEG's default chroma upsampling is the
nearest pixel. The pipeline API is used and not `experimental.dynamic`, which leaks every image while Python's garbage
collector is off, as it is in Megatron's training loop.

One bad image makes DALI fail for the whole batch without saying which one. So: headers are read first (size guard,
formats that DALI lacks go to Pillow); a batch that still fails is halved until the bad image stands alone, on a rebuilt
pipeline each time; what DALI refuses Pillow may try; what both refuse is undecodable.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from megatron_eve.data.image_size import MAX_IMAGE_PIXELS
from megatron_eve.data.quarantine import SampleError

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
GPU_DECODER_OPTIONS: dict[str, Any] = {
    "device_memory_padding": 64 << 20,
    "host_memory_padding": 32 << 20,
    "preallocate_width_hint": 2048,
    "preallocate_height_hint": 2048,
    "hw_decoder_load": 0.65,
}
"""nvJPEG's buffers: allocated once for images of this size, bytes and pixels, instead of growing image by image, each
time with a synchronisation. Larger images are decoded all the same. `hw_decoder_load`: the share for the decoding unit
of A100, H100 and H200, DALI's own default, the rest goes to the CUDA decoder. Chosen without a GPU; docs/gpu.md."""
_DALI_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM")


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image to decode. Sizes are (height, width)."""

    data: bytes
    source_size: tuple[int, int]  # as in the shard's row, after EXIF rotation
    target_size: tuple[int, int]


class ImageDecoder:
    """Decodes and resizes batches of any size. Not for use by two threads at once; give each thread its own."""

    def __init__(
        self,
        *,
        device: Literal["cpu", "cuda"],
        max_batch: int = 16,
        num_threads: int = 1,
        device_id: int = 0,
    ) -> None:
        self._device = device
        self._max_batch = max_batch
        self._num_threads = num_threads
        self._device_id = device_id
        self._pipeline: Any = None

    def decode(self, jobs: Sequence[ImageJob]) -> list[NDArray[np.uint8] | SampleError]:
        """Pixels [H, W, 3] at `target_size` or the reason why not, for each job in order."""
        results: list[NDArray[np.uint8] | SampleError | None] = [None] * len(jobs)
        for_dali: list[int] = []
        for i, job in enumerate(jobs):
            try:
                image_format = check_header(job.data, source_size=job.source_size)
            except SampleError as error:
                results[i] = error
                continue
            if image_format in _DALI_FORMATS:
                for_dali.append(i)
            else:
                results[i] = _decode_with_pillow(job)
        for begin in range(0, len(for_dali), self._max_batch):
            chunk = for_dali[begin : begin + self._max_batch]
            decoded = self._decode_isolating([jobs[i] for i in chunk])
            for i, result in zip(chunk, decoded, strict=True):
                results[i] = result
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def _decode_isolating(self, jobs: Sequence[ImageJob]) -> list[NDArray[np.uint8] | SampleError]:
        """One DALI batch; on failure halves, so that k bad images of n cost about k * log2(n) runs."""
        try:
            return list(self._run(jobs))
        except RuntimeError:
            self._pipeline = None  # DALI: "current pipeline object is no longer valid"
        if len(jobs) == 1:
            return [_decode_with_pillow(jobs[0])]
        middle = len(jobs) // 2
        return self._decode_isolating(jobs[:middle]) + self._decode_isolating(jobs[middle:])

    def _run(self, jobs: Sequence[ImageJob]) -> list[NDArray[np.uint8]]:
        """Raises RuntimeError if DALI cannot decode any one of the images."""
        if self._pipeline is None:
            self._pipeline = _build_pipeline(
                device=self._device,
                max_batch=self._max_batch,
                num_threads=self._num_threads,
                device_id=self._device_id,
            )
        (images,) = self._pipeline.run(
            encoded=[np.frombuffer(job.data, np.uint8) for job in jobs],
            size=[np.asarray(job.target_size, np.float32) for job in jobs],
        )
        on_host = images if self._device == "cpu" else images.as_cpu()
        return [on_host.at(i) for i in range(len(jobs))]  # `at` copies: the pipeline may run again


def _build_pipeline(
    *, device: Literal["cpu", "cuda"], max_batch: int, num_threads: int, device_id: int
) -> Any:
    """DALI graph: encoded bytes and one target size per image in, resized RGB out. CPU and GPU differ by a flag."""
    from nvidia.dali import fn, pipeline_def, types  # takes seconds to import

    def decode_and_resize() -> Any:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, batch=True)
        size = fn.external_source(name="size", ndim=1, dtype=types.FLOAT, batch=True)
        image = fn.decoders.image(
            encoded,
            device="cpu" if device == "cpu" else "mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,
            **({} if device == "cpu" else GPU_DECODER_OPTIONS),
        )
        return fn.resize(image, size=size, interp_type=types.INTERP_CUBIC, antialias=True)

    define = pipeline_def(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=None if device == "cpu" else device_id,
        prefetch_queue_depth=1,
    )
    pipeline = define(decode_and_resize)()
    pipeline.build()
    return pipeline


def check_header(data: bytes, *, source_size: tuple[int, int] | None) -> str:
    """Pillow's name of the format, from the header alone; no pixel is decoded.

    Raises SampleError: undecodable; too_many_pixels; size_mismatch if the header, after EXIF rotation, is not
    `source_size` (None: not compared)."""
    size, image_format = _read_header(data)
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise SampleError(
            "too_many_pixels", f"image is {size[0]} x {size[1]}, limit {MAX_IMAGE_PIXELS:,} pixels"
        )
    if source_size is not None and size != source_size:
        raise SampleError(
            "size_mismatch",
            f"the file is {size[0]} x {size[1]}, the shard's row says {source_size[0]} x {source_size[1]}",
        )
    return image_format


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) after EXIF rotation, from the header. Raises SampleError: undecodable."""
    return _read_header(data)[0]


def _read_header(data: bytes) -> tuple[tuple[int, int], str]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
            return ((width, height) if sideways else (height, width)), image.format or ""
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged headers
        raise SampleError("undecodable", _describe(data, error)) from error


def decode_reference(data: bytes, *, target_size: tuple[int, int]) -> NDArray[np.uint8]:
    """What the official code computes, with Pillow: EXIF rotation, RGB, bicubic resize. [H, W, 3] uint8."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    height, width = target_size
    return np.array(upright.resize((width, height), Image.Resampling.BICUBIC))


def _decode_with_pillow(job: ImageJob) -> NDArray[np.uint8] | SampleError:
    try:
        return decode_reference(job.data, target_size=job.target_size)
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
        return SampleError("undecodable", _describe(job.data, error))


def _describe(data: bytes, error: Exception) -> str:
    return f"{len(data)} bytes starting {data[:8]!r}: {type(error).__name__}: {str(error)[:200]}"
