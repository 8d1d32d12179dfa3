# SPDX-License-Identifier: Apache-2.0
"""Records the steps and ranks that `profile.*` names, into RUN_DIR/profile:

    rank0000.kineto.json    torch.profiler's trace (profile.tool=kineto)
    rank0000.nsys-rep       Nsight Systems' report, written by the nsys that started this process (profile.tool=nsys)
    rank0000.steps.json     not in the trace: tokens, FLOPs and times of the captured steps, layout, device

A process that records nothing pays three flag checks a step. `tools.profile` starts captures and reads them."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from megatron_eve import device
from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import MissingHereError
from megatron_eve.metrics.captured import STEP_VALUES, capture_file
from megatron_eve.metrics.peak import peak_flops
from megatron_eve.metrics.ranges import (
    Emitter,
    ModuleRanges,
    NvtxEmitter,
    RangeTimers,
    TorchEmitter,
)
from megatron_eve.parallel.groups import ParallelState
from megatron_eve.run_files import PROFILE_FOLDER
from megatron_eve.whole import write_json

device.install()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.utils import configure_nvtx_profiling  # noqa: E402

_LOG = logging.getLogger(__name__)
_NOTHING = nullcontext()


def no_range(name: str) -> AbstractContextManager[None]:
    """The `ranges` of a step that is not captured."""
    return _NOTHING


class Capture:
    """The capture of one process; does nothing on a rank or in a step that is not captured."""

    def __init__(
        self,
        config: RunConfig,
        *,
        run_dir: Path,
        state: ParallelState,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        """Raises: MissingHereError for profile.tool=nsys on a machine without CUDA."""
        self._config, self._profile, self._state = config, config.profile, state
        self._folder = run_dir / PROFILE_FOLDER
        self._model, self._optimizer = model, optimizer
        self._wanted = self._profile.tool != "none" and state.rank in self._profile.ranks
        self._recorder: _Recorder | None = None
        self._steps: list[dict[str, float]] = []
        if self._profile.tool == "nsys" and not device.has_gpu():
            raise MissingHereError(
                "profile.tool=nsys records CUDA and there is no CUDA device; use profile.tool=kineto"
            )

    def step(self, number: int) -> AbstractContextManager[None]:
        """Around step `number`, counted as in the log: begins the capture before its first step."""
        if not self._wanted or number < self._profile.first_step:
            return _NOTHING
        if self._recorder is None:
            try:
                self._recorder = _Recorder(self._config, self._model, self._optimizer)
            except Exception as error:
                self._give_up(error)
                return _NOTHING
        return self._recorder.step(number)

    def range(self, name: str) -> AbstractContextManager[None]:
        """A named part of the running step."""
        return _NOTHING if self._recorder is None else self._recorder.range(name)

    def done(self, number: int, values: Mapping[str, float]) -> None:
        """Ends the capture after its last step; after step `number`, with its values by metrics/definitions.py."""
        if self._recorder is None:
            return
        self._steps.append({"step": number, **{name: values[name] for name in STEP_VALUES}})
        if number >= self._profile.last_step:
            self.close()

    def close(self) -> None:
        """Write the capture, even if the run ends within its window. Nothing is captured from here on."""
        self._wanted = False
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        try:
            self._write(recorder)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """A capture that fails ends no run."""
        self._wanted = False
        _LOG.warning("nothing is captured: %s: %s; the run goes on", type(error).__name__, error)

    def _write(self, recorder: "_Recorder") -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = capture_file(self._folder, rank=self._state.rank, suffix=".kineto.json")
        recorder.finish(trace)
        sidecar = capture_file(self._folder, rank=self._state.rank, suffix=".steps.json")
        write_json(sidecar, self._facts())
        _LOG.info("captured steps %s into %s", [int(s["step"]) for s in self._steps], self._folder)

    def _facts(self) -> dict[str, Any]:
        config = self._config
        return {
            "rank": self._state.rank,
            "recipe": config.recipe,
            "stage": config.stage.name,
            "tool": self._profile.tool,
            "device": device.device_name() or "cpu",
            "dtype": config.train.dtype,
            "peak_flops": peak_flops(device.device_name(), dtype=config.train.dtype),
            "world_size": self._state.world_size,
            "parallel": dataclasses.asdict(config.parallel),
            "steps": self._steps,
        }


class _Recorder:
    """A running capture: hooks, megatron-core's timers, and the profiler itself."""

    def __init__(
        self,
        config: RunConfig,
        model: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> None:
        self._nsys = config.profile.tool == "nsys"
        self._emitter: Emitter = NvtxEmitter() if self._nsys else TorchEmitter()
        self._modules = ModuleRanges(model, self._emitter)
        self._timers = RangeTimers(self._emitter, after_backward=self._modules.close_all)
        schedules: list[Any] = [chunk.config for chunk in model]
        self._timed = [*schedules, optimizer.config]
        for mcore in self._timed:
            mcore.timers = self._timers
        self._profiler: torch.profiler.profile | None = None
        self._begin()

    def _begin(self) -> None:
        torch.cuda.synchronize()
        if self._nsys:
            configure_nvtx_profiling(True)  # megatron-core's own ranges are off without it
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.has_gpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()

    def finish(self, trace: Path) -> None:
        torch.cuda.synchronize()
        self._modules.remove()
        for mcore in self._timed:
            mcore.timers = None
        if self._profiler is None:
            torch.cuda.profiler.stop()  # nsys writes its report at the end of the process
            configure_nvtx_profiling(False)
        else:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(trace))

    def step(self, number: int) -> AbstractContextManager[None]:
        self._timers.new_step()
        return self.range(f"step={number}")

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        self._emitter.push(name)
        try:
            yield
        finally:
            self._emitter.pop()
