# SPDX-License-Identifier: Apache-2.0
"""Parts `full` and `images` of the GPU benchmark: the whole model with decoded images in the loop, and decoding alone.

`full`: forward and backward of all 28 layers with fp32 gradient buffers, no optimizer (its state does not fit beside
them on one GPU), packs made from JPEG files while the GPU computes. Model FLOP utilisation from what the loss needs
(metrics/flops.py), the loader's wait, and memory beside the estimate of `--dry-run`. `images`: images per second of the
product's decoder, its difference to Pillow, and memory over many batches."""

import os
import queue
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_eve import device
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import memory_estimate
from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.conversation import IMAGE_PLACEHOLDER, EncodedSample
from megatron_eve.data.read.image import ImageDecoder, ImageJob, decode_reference
from megatron_eve.data.read.image_size import PIXELS_PER_TOKEN, train_size
from megatron_eve.data.sample import IGNORE, Pack
from megatron_eve.metrics.flops import executed_flops, ideal_flops
from megatron_eve.metrics.peak import peak_flops
from megatron_eve.model.accelerators import has_module
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from megatron_eve.training.assemble import build_wrapped_model
from megatron_eve.training.step import forward_backward
from tools.bench.gpu_setting import NotHere, Rows, Setting, image_bytes
from tools.bench.samples import BenchSample, as_pack

File = tuple[bytes, tuple[int, int]]  # JPEG and its (height, width)
Decode = Callable[[list[ImageJob]], list[Any]]
_GIB = 1 << 30


def pillow_decoder() -> Decode:
    """The reference decoder, one image at a time."""
    return lambda jobs: [decode_reference(job.data, target_size=job.target_size) for job in jobs]


def dali_decoder(where: str) -> Decode:
    """The product's decoder. Raises: NotHere."""
    if not has_module("nvidia.dali"):
        raise NotHere("nvidia-dali is not installed")
    if where == "cuda" and not device.has_gpu():
        raise NotHere("no GPU")
    return ImageDecoder(device="cuda" if where == "cuda" else "cpu", max_batch=16).decode


class PackMaker:
    """Packs from image files: sizes first, as the trainer plans, then decoding and cutting into patches."""

    def __init__(self, config: RunConfig, files: list[File], *, decode: Decode) -> None:
        self._config, self._files, self._decode = config, files, decode
        self._shape = PackShape(pack_tokens=config.data.pack_tokens, align=config.data.align)

    def make(self, seed: int) -> Pack:
        """Samples with one image and a caption each, until the next does not fit."""
        rng = np.random.default_rng(seed)
        jobs, texts, vision, text = [], [], 0, 0
        while True:
            data, size = self._files[int(rng.integers(len(self._files)))]
            target = self._target(size)
            edge = self._config.model.pixels_per_token
            rows, columns = target[0] // edge, target[1] // edge
            length = int(rng.integers(64, 192)) if self._config.data.pack_tokens > 2048 else 8
            vision, text = vision + rows * columns + rows + 1, text + length
            if not self._shape.fits(vision, text):
                break
            jobs.append(ImageJob(data=data, source_size=size, target_size=target))
            texts.append(rng.integers(0, self._config.model.vocab_size, length))
        images = self._decode(jobs)
        samples = [
            BenchSample(_caption(ids), (image,)) for ids, image in zip(texts, images, strict=True)
        ]
        return as_pack(samples, config=self._config)

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        """The trainer's rule, in the tokens of a smaller patch where the model has one."""
        height, width = train_size(*size, edge=self._config.data.image_edge)
        scale = self._config.model.pixels_per_token / PIXELS_PER_TOKEN
        return round(height * scale), round(width * scale)


def _caption(ids: np.ndarray[Any, Any]) -> EncodedSample:
    return EncodedSample(
        ids=np.concatenate([[IMAGE_PLACEHOLDER], ids]),
        labels=np.concatenate([[IGNORE], ids]),
        was_cut=False,
    )


class Feed:
    """Packs made ahead by threads, each with a decoder of its own."""

    def __init__(self, make_maker: Callable[[], PackMaker], *, threads: int, ahead: int) -> None:
        self._packs: queue.Queue[Pack | Exception] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        for number in range(threads):
            arguments = (make_maker, number, threads)
            threading.Thread(target=self._work, args=arguments, daemon=True).start()

    def _work(self, make_maker: Callable[[], PackMaker], first: int, stride: int) -> None:
        seed = first
        try:
            maker = make_maker()
            while not self._stop.is_set():
                self._put(maker.make(seed))
                seed += stride
        except Exception as error:  # for the thread that waits
            self._put(error)

    def _put(self, item: Pack | Exception) -> None:
        while not self._stop.is_set():
            try:
                return self._packs.put(item, timeout=0.2)
            except queue.Full:
                continue

    def next(self) -> Pack:
        item = self._packs.get(timeout=120)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()


def full(setting: Setting, rows: Rows) -> None:
    """Part `full`: one row a stage, the stage that needs most memory last."""
    init_distributed(timeout_s=600)
    files = image_bytes(24, edge=setting.image_edge)
    for stage, tokens in setting.full_tokens.items():
        config = setting.config(stage, pack_tokens=tokens)
        rows.attempt(
            f"stage {stage}, {tokens} tokens a pack",
            partial(whole_model, config, files, setting=setting),
        )


def whole_model(config: RunConfig, files: list[File], *, setting: Setting) -> dict[str, Any]:
    """Steps of one pack, images decoded meanwhile."""
    state = init_model_parallel(config.parallel, seed=1)
    if device.has_gpu():
        torch.cuda.reset_peak_memory_stats()
    wrapped = build_wrapped_model(config, state=state).wrapped
    decoder = "DALI, GPU" if _can_use_dali_on_gpu() else "Pillow"
    feed = Feed(lambda: _maker(config, files), threads=setting.loader_threads, ahead=4)
    times: list[tuple[float, float]] = []
    packs: list[Pack] = []
    try:
        for _ in range(2 + setting.rounds):
            started = time.perf_counter()
            packs.append(feed.next())
            waited = time.perf_counter() - started
            forward_backward(wrapped, packs[-1:], config=config, state=state)
            if device.has_gpu():
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started, waited))
    finally:
        feed.close()
    figures = _speed(config, packs[2:], times[2:]) | _memory(config)
    return {"decoder": decoder, **figures}


def _maker(config: RunConfig, files: list[File]) -> PackMaker:
    decode = dali_decoder("cuda") if _can_use_dali_on_gpu() else pillow_decoder()
    return PackMaker(config, files, decode=decode)


def _can_use_dali_on_gpu() -> bool:
    return device.has_gpu() and has_module("nvidia.dali")


def _speed(
    config: RunConfig, packs: list[Pack], times: list[tuple[float, float]]
) -> dict[str, Any]:
    model, trainable = config.model, config.stage.trainable
    step = statistics.median(seconds for seconds, _ in times)
    total, waited = (sum(column) for column in zip(*times, strict=True))
    ideal = sum(ideal_flops(pack, model=model, trainable=trainable) for pack in packs)
    executed = sum(executed_flops(pack, config=config) for pack in packs)
    vision = sum(pack.num_real_vision for pack in packs)
    text = sum(pack.num_real_text for pack in packs)
    useful = vision + text
    peak = peak_flops(device.device_name(), dtype=config.train.dtype)
    return {
        "stage": config.stage.name,
        "pack_tokens": config.data.pack_tokens,
        "samples": sum(len(pack.sample_ids) for pack in packs),
        "vision_tokens": vision,
        "text_tokens": text,
        "label_tokens": sum(int(pack.label_rows.numel()) for pack in packs),
        "steps": len(times),
        "median_step_s": round(step, 4),
        "median_step_without_waiting_s": round(
            statistics.median(seconds - waiting for seconds, waiting in times), 4
        ),
        "waited_for_data": round(waited / total, 4),
        "useful_tokens_per_s": round(useful / total, 1),
        "images_per_s": round(sum(len(pack.sample_ids) for pack in packs) / total, 2),
        "fill": round(useful / sum(pack.num_tokens for pack in packs), 4),
        "useful_tflops": round(ideal / total / 1e12, 2),
        "executed_tflops": round(executed / total / 1e12, 2),
        "mfu": round(ideal / total / peak, 4) if peak else None,
        "mfu_without_waiting": round(ideal / (total - waited) / peak, 4) if peak else None,
    }


def _memory(config: RunConfig) -> dict[str, Any]:
    estimate = memory_estimate(config)
    held = estimate.weights + estimate.gradients
    figures: dict[str, Any] = {"estimated_weights_and_gradients_gib": round(held / _GIB, 2)}
    if device.has_gpu():
        peak = torch.cuda.max_memory_allocated()
        figures["peak_gib"] = round(peak / _GIB, 2)
        figures["activations_and_buffers_gib"] = round((peak - held) / _GIB, 2)
        figures["reserved_gib"] = round(torch.cuda.max_memory_reserved() / _GIB, 2)
    return figures


def images(setting: Setting, rows: Rows) -> None:
    """Part `images`."""
    files = image_bytes(min(setting.images, 64), edge=setting.image_edge, seed=1)
    for name, make in (
        ("Pillow, one thread", pillow_decoder),
        ("DALI on the CPU", partial(dali_decoder, "cpu")),
        ("DALI on the GPU", partial(dali_decoder, "cuda")),
    ):
        rows.attempt(name, partial(decoding, make, files, setting=setting))


def decoding(make: Callable[[], Decode], files: list[File], *, setting: Setting) -> dict[str, Any]:
    """Throughput over `setting.images` images, difference to Pillow, growth of memory from a quarter of them on."""
    decode = make()
    jobs = [
        ImageJob(data=data, source_size=size, target_size=train_size(*size, edge=1600))
        for data, size in files
    ]
    difference = max(
        float(np.abs(pixels.astype(np.int16) - _reference(job)).mean())
        for pixels, job in zip(decode(jobs[:4]), jobs[:4], strict=True)
    )
    done, begin, early = 0, time.perf_counter(), _resident()
    batch = min(16, len(jobs))
    while done < setting.images and time.perf_counter() - begin < 12:
        start = done % (len(jobs) - batch + 1)
        decode(jobs[start : start + batch])
        done += batch
        if done <= setting.images // 4:
            early = _resident()
    seconds = time.perf_counter() - begin
    return {
        "images": done,
        "images_per_s": round(done / seconds, 1),
        "mean_difference_to_pillow_of_255": round(difference, 4),
        "growth_after_a_quarter_mib": {
            k: round((v - early[k]) / 2**20, 1) for k, v in _resident().items()
        },
    }


def _reference(job: ImageJob) -> Any:
    return decode_reference(job.data, target_size=job.target_size).astype(np.int16)


def _resident() -> dict[str, int]:
    """Bytes held by this process on the host, and by everything on the GPU."""
    with open(f"/proc/{os.getpid()}/statm") as file:
        held = {"host": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if device.has_gpu():
        free, total = torch.cuda.mem_get_info()
        held["gpu"] = total - free
    return held


def environment(setting: Setting, rows: Rows) -> None:
    """Part `environment`: what the figures were measured with."""
    rows.attempt("versions", _versions)
    rows.attempt("device", _device)


def _versions() -> dict[str, Any]:
    from importlib import metadata

    found = {}
    for name in ("torch", "triton", "transformer-engine", "transformer-engine-cu13", "megatron-core", "flash-attn",
                 "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-dali-cuda130"):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _device() -> dict[str, Any]:
    if not device.has_gpu():
        return {"device": "CPU", "threads": torch.get_num_threads()}
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    from tools.bench.gpu_setting import seconds_of

    seconds = seconds_of(lambda: a @ b, rounds=10)
    return {
        "device": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / _GIB, 1),
        "cuda": torch.version.cuda,
        "bf16_product_tflops": round(2 * size**3 / seconds / 1e12, 1),
    }
