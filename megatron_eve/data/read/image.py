# SPDX-License-Identifier: Apache-2.0
"""Encoded images to resized RGB pixels, which are Pillow's to the bit. A bad image affects no other.

Comes in: encoded bytes, the size that the shard's row gives, the size to resize to. Goes out, per image: uint8 pixels
[H, W, 3] on the host, or a `SampleError` (undecodable, size_mismatch, too_many_pixels).

JPEG of three colours or grey is decoded by NVIDIA DALI, on the CPU (libjpeg-turbo, as in Pillow: equal to the bit) or
on the GPU (nvJPEG: another rounding, not yet verified). DALI does not turn. Pillow decodes every other file: it is as
fast there, and DALI reads some of them differently (TIFF, BMP, palettes, 16 bits). Then data/read/pixels.py turns and
resizes, as it does in inference. We use the pipeline API, because `experimental.dynamic` leaks every image while
Python's garbage collector is off, as it is in Megatron's training loop.

One bad image makes DALI fail for the whole batch without saying which one. So: headers are read first (size guard,
orientation); a batch that still fails is halved until the bad image is alone, on a rebuilt pipeline each time; Pillow
tries what DALI refuses; what both refuse is undecodable.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.read.image_size import MAX_IMAGE_PIXELS
from megatron_eve.data.read.pixels import resized, rgb_pixels, turn_of, turned, turned_size
from megatron_eve.data.read.quarantine import SampleError

FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "JPEG2000", "PPM"),
    *("GIF", "AVIF", "ICO", "TGA"),
)
"""Formats that are opened at all: those whose Pillow decoder runs no outside program such as Ghostscript."""
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

Pixels = NDArray[np.uint8] | SampleError
"""A decoded image [H, W, 3], or the error."""


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One image to decode. Sizes are (height, width)."""

    data: bytes
    source_size: tuple[int, int]  # as in the shard's row, once it is turned
    target_size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _JpegJob:
    """A JPEG for DALI, and how Pillow then turns it."""

    job: ImageJob
    turn: Image.Transpose | None


class ImageDecoder:
    """Decodes and resizes batches of any size. Not for use by two threads at once; give each thread its own.

    `exif_rotation`: `data.exif_rotation`, whether the orientation in metadata is obeyed."""

    def __init__(
        self,
        *,
        device: Literal["cpu", "cuda"],
        exif_rotation: bool = True,
        max_batch: int = 16,
        num_threads: int = 1,
        device_id: int = 0,
    ) -> None:
        self._device = device
        self._exif_rotation = exif_rotation
        self._max_batch = max_batch
        self._num_threads = num_threads
        self._device_id = device_id
        self._pipeline: Any = None

    def decode(self, jobs: Sequence[ImageJob]) -> list[Pixels]:
        """Pixels [H, W, 3] at `target_size`, or the error, for each job in order."""
        results: dict[int, Pixels] = {}
        for_dali: dict[int, _JpegJob] = {}
        for i, job in enumerate(jobs):
            found = self._start(job)
            if isinstance(found, _JpegJob):
                for_dali[i] = found
            else:
                results[i] = found
        places = list(for_dali)
        for begin in range(0, len(places), self._max_batch):
            chunk = places[begin : begin + self._max_batch]
            decoded = self._decode_isolating([for_dali[i] for i in chunk])
            results.update(zip(chunk, decoded, strict=True))
        return [results[i] for i in range(len(jobs))]

    def _start(self, job: ImageJob) -> Pixels | _JpegJob:
        """Check the header; decode here and now what is not for DALI."""
        try:
            with open_image(job.data) as image:
                turn = _checked_turn(image, job=job, exif_rotation=self._exif_rotation)
                if image.format == "JPEG" and image.mode in ("L", "RGB"):
                    return _JpegJob(job, turn)
                return _finish(rgb_pixels(image), turn=turn, size=job.target_size)
        except SampleError as error:
            return error
        except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
            return SampleError("undecodable", _describe(job.data, error))

    def _decode_isolating(self, jobs: Sequence[_JpegJob]) -> list[Pixels]:
        """One DALI batch; on failure halves, so that k bad images of n cost about k * log2(n) runs."""
        try:
            return list(self._run(jobs))
        except RuntimeError:
            self._pipeline = None  # DALI: "current pipeline object is no longer valid"
        if len(jobs) == 1:
            return [_decode_with_pillow(jobs[0])]
        middle = len(jobs) // 2
        return self._decode_isolating(jobs[:middle]) + self._decode_isolating(jobs[middle:])

    def _run(self, jobs: Sequence[_JpegJob]) -> Iterator[NDArray[np.uint8]]:
        """Raises RuntimeError if DALI cannot decode any one of the images."""
        if self._pipeline is None:
            self._pipeline = _build_pipeline(
                device=self._device,
                max_batch=self._max_batch,
                num_threads=self._num_threads,
                device_id=self._device_id,
            )
        (images,) = self._pipeline.run(
            encoded=[np.frombuffer(entry.job.data, np.uint8) for entry in jobs]
        )
        on_host = images if self._device == "cpu" else images.as_cpu()
        for i, entry in enumerate(jobs):
            stored = Image.fromarray(on_host.at(i))
            yield _finish(stored, turn=entry.turn, size=entry.job.target_size)


def _build_pipeline(
    *, device: Literal["cpu", "cuda"], max_batch: int, num_threads: int, device_id: int
) -> Any:
    """DALI graph: encoded bytes in, RGB as stored out. CPU and GPU differ by a flag."""
    from nvidia.dali import fn, pipeline_def, types  # takes seconds to import

    def decode() -> Any:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, batch=True)
        return fn.decoders.image(
            encoded,
            device="cpu" if device == "cpu" else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # data/read/pixels.py decides it
            jpeg_fancy_upsampling=True,  # nvJPEG's default chroma upsampling is the nearest pixel
            **({} if device == "cpu" else GPU_DECODER_OPTIONS),
        )

    define = pipeline_def(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=None if device == "cpu" else device_id,
        prefetch_queue_depth=1,
    )
    pipeline = define(decode)()
    pipeline.build()
    return pipeline


def open_image(data: bytes) -> Image.Image:
    """The image with its header read, no pixel decoded. Raises SampleError: undecodable, too_many_pixels."""
    Image.init()  # registers all formats; without it Pillow knows five, and others raise KeyError
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged headers
        raise SampleError("undecodable", _describe(data, error)) from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise SampleError(
            "too_many_pixels", f"image is {height} x {width}, limit {MAX_IMAGE_PIXELS:,} pixels"
        )
    return image


def image_size(data: bytes, *, exif_rotation: bool = True) -> tuple[int, int]:
    """(height, width) as it is trained on, turned or not. Raises SampleError: undecodable, too_many_pixels."""
    with open_image(data) as image:
        try:
            turn = turn_of(image, exif_rotation=exif_rotation)
        except Exception as error:  # as above: PNG and TIFF are decoded
            raise SampleError("undecodable", _describe(data, error)) from error
        return turned_size(image, turn)


def _checked_turn(
    image: Image.Image, *, job: ImageJob, exif_rotation: bool
) -> Image.Transpose | None:
    turn = turn_of(image, exif_rotation=exif_rotation)
    size = turned_size(image, turn)
    if size != job.source_size:
        raise SampleError(
            "size_mismatch",
            f"the file is {size[0]} x {size[1]}, the shard's row says {job.source_size[0]} x {job.source_size[1]}",
        )
    return turn


def _finish(
    rgb: Image.Image, *, turn: Image.Transpose | None, size: tuple[int, int]
) -> NDArray[np.uint8]:
    return np.array(resized(turned(rgb, turn), size=size))


def decode_reference(
    data: bytes, *, target_size: tuple[int, int], exif_rotation: bool = True
) -> NDArray[np.uint8]:
    """The pixels of inference, which training equals, by Pillow alone. [H, W, 3] uint8.

    Raises SampleError: undecodable, too_many_pixels."""
    with open_image(data) as image:
        try:
            turn = turn_of(image, exif_rotation=exif_rotation)
            return _finish(rgb_pixels(image), turn=turn, size=target_size)
        except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
            raise SampleError("undecodable", _describe(data, error)) from error


def _decode_with_pillow(entry: _JpegJob) -> Pixels:
    try:
        with open_image(entry.job.data) as image:
            return _finish(rgb_pixels(image), turn=entry.turn, size=entry.job.target_size)
    except SampleError as error:
        return error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
        return SampleError("undecodable", _describe(entry.job.data, error))


def _describe(data: bytes, error: Exception) -> str:
    return f"{len(data)} bytes starting {data[:8]!r}: {type(error).__name__}: {str(error)[:200]}"
