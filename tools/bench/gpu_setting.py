# SPDX-License-Identifier: Apache-2.0
"""What the parts of the GPU benchmark share: sizes for one 141 GB GPU and tiny ones for a CPU, timing, error measures.

At size `full` everything has Qwen2.5-7B's shapes on backend `te` in BF16; at size `tiny` the same code runs in seconds
on backend `local` in fp32, so that a mistake shows where there is no GPU."""

import dataclasses
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eve import device
from megatron_eve.config.gpu_checks import FP8_BLOCK
from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.schema import GpuConfig, ModelConfig, RunConfig
from tools.bench.report import BenchmarkError
from tools.bench.setting import STAGES, Scale, one_process, over_all_tokens, scaled_config

Size = Literal["full", "tiny"]
TINY_SCALE = Scale(hidden_size=256, num_layers=2, token_share=1 / 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The sizes of one run of the benchmark."""

    size: Size
    backend: Literal["local", "te"]
    dtype: Literal["bf16", "fp32"]
    layer_tokens: tuple[int, ...]  # of one layer's input
    full_tokens: dict[str, int]  # pack of the whole model, by stage
    parity_model: Scale  # the whole model against a reference, and FP8 over some steps
    fp8_steps: int
    rounds: int
    images: int  # decoded for throughput
    image_edge: int  # of the source images, about
    loader_threads: int

    @property
    def recipes(self) -> tuple[Literal["current", "delayed", "block"], ...]:
        """FP8 recipes to run; none where there is no FP8."""
        return ("current", "delayed", "block") if self.backend == "te" else ()

    def config(self, stage: str, *, pack_tokens: int | None = None, **gpu: Any) -> RunConfig:
        """The stage's recipe on one process."""
        if self.size == "tiny":
            config = scaled_config(stage, scale=TINY_SCALE, dtype=self.dtype)
        else:
            recipe = RECIPES[STAGES[stage]]()
            optim = over_all_tokens(recipe.optim)
            config = dataclasses.replace(recipe, parallel=one_process(), optim=optim)
        tokens = pack_tokens or config.data.pack_tokens
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, pack_tokens=tokens),
            train=dataclasses.replace(
                config.train, backend=self.backend, dtype=self.dtype, recompute="none"
            ),
            gpu=GpuConfig(**gpu),
        )

    def small_config(self, stage: str, **gpu: Any) -> RunConfig:
        """The same with the model of the parity parts."""
        config = scaled_config(stage, scale=self.parity_model, dtype=self.dtype)
        train = dataclasses.replace(config.train, backend=self.backend, recompute="none")
        align = (
            config.data.align if self.size == "tiny" else FP8_BLOCK
        )  # rows that every recipe takes
        data = dataclasses.replace(config.data, align=align)
        return dataclasses.replace(config, data=data, train=train, gpu=GpuConfig(**gpu))

    @property
    def layer_model(self) -> ModelConfig:
        """One layer of the split model."""
        return dataclasses.replace(self.config("2.2").model, num_layers=1)


FULL = Setting(
    size="full",
    backend="te",
    dtype="bf16",
    layer_tokens=(8192, 16384),
    full_tokens={"1": 16384, "2.1": 16384, "2.2": 8192},
    parity_model=Scale(hidden_size=1024, num_layers=4, token_share=1 / 8),
    fp8_steps=200,
    rounds=10,
    images=2000,
    image_edge=1400,
    loader_threads=12,
)
TINY = Setting(
    size="tiny",
    backend="local",
    dtype="fp32",
    layer_tokens=(512,),
    full_tokens={"2.1": 512},
    parity_model=TINY_SCALE,
    fp8_steps=2,
    rounds=1,
    images=8,
    image_edge=96,
    loader_threads=1,
)
SETTINGS: dict[Size, Setting] = {"full": FULL, "tiny": TINY}


@dataclass
class Rows:
    """The results of one part, kept on disk after each: what comes later cannot lose what was measured before."""

    save: Callable[[list[dict[str, Any]]], None]
    deadline: float  # time.monotonic() after which nothing new is begun
    rows: list[dict[str, Any]] = field(default_factory=list)

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One case: its figures, or why there are none."""
        started = time.monotonic()
        if started > self.deadline:
            row: dict[str, Any] = {"skipped": "the part's time was used up"}
        else:
            try:
                row = measure()
            except NotHere as reason:
                row = {"skipped": str(reason)}
            except (
                Exception
            ) as error:  # whatever a kernel or library raises belongs to this case alone
                lines = traceback.format_exc().strip().splitlines()
                row = {"error": f"{type(error).__name__}: {str(error)[:400]}", "trace": lines[-6:]}
        seconds = round(time.monotonic() - started, 2)
        self.rows.append({"case": name, **row, "took_s": seconds})
        self.save(self.rows)
        gc.collect()  # gradient hooks hold whole models in cycles
        if device.has_gpu():
            torch.cuda.empty_cache()


class NotHere(BenchmarkError):
    """A case needs something that this machine lacks."""


def seconds_of(call: Callable[[], object], *, rounds: int, warm_up: int = 3) -> float:
    """Median seconds of a call on the device's own clock (events), or of the wall clock on a CPU."""
    for _ in range(warm_up if rounds > 1 else 0):
        call()
    return statistics.median(_timed(call) for _ in range(rounds))


def _timed(call: Callable[[], object]) -> float:
    if not device.has_gpu():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleaved(
    contenders: dict[str, Callable[[], object]], *, rounds: int, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each, one call of each in turn."""
    for _ in range(warm_up if rounds > 1 else 0):
        for call in contenders.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(_timed(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, both in fp64."""
    wide = expected.double()
    norm = float(wide.norm())
    return float((found.double() - wide).norm()) / max(norm, 1e-300)


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(1e3 * value, 3) for name, value in seconds.items()}


def image_bytes(count: int, *, edge: int, seed: int = 0) -> list[tuple[bytes, tuple[int, int]]]:
    """JPEG files of photographs' sizes and smoothness, and their (height, width)."""
    import io

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        stretch = float(np.exp(rng.normal() * 0.15))
        height, width = (max(32, round(edge * s)) for s in (stretch, 1 / stretch))
        coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
        pixels = np.minimum(np.asarray(image, dtype=np.uint16) + noise, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        files.append((buffer.getvalue(), (height, width)))
    return files
