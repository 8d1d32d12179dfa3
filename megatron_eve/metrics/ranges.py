# SPDX-License-Identifier: Apache-2.0
"""Named ranges of a captured step: what the host was doing when it launched a kernel.

    eve/step=12                     one optimizer step              eve/data_wait    waiting for packs
    eve/forward=0, eve/backward=0   of the step's n-th micro-batch  eve/optimizer    gradient norm, update, schedule
    eve/layer=3                     one decoder layer               eve/module=NAME  a part of it, or of the model
    eve/module=linear_qkv.vision    one modality of it              eve/permutation  between modality and sequence order
    eve/mcore=NAME                  megatron-core's own timers: schedule, collectives behind it, optimizer parts

A range that autograd runs ends in `/backward`. A step that is not captured runs none of this: modules get hooks, and
megatron-core's configurations their `timers`, when a capture begins, and lose them when it ends.

The range of a module's backward reaches from the gradient of its output to that of its input: two hooks on tensors,
which leave the graph as it is; torch's full backward hooks make views, which megatron-core's pipeline refuses. A module
whose input needs no gradient (the embeddings) ends with the micro-batch. `permutation` lies between the projections
and the core attention on both sides, so it holds RoPE and the split into heads too."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_eve.metrics.captured import BACKWARD, PREFIX

MODALITIES = ("vision", "text")
MODULES = (
    "embedding",
    "patch_embedding",
    "input_layernorm",
    "self_attention",
    "linear_qkv",
    "core_attention",
    "linear_proj",
    "pre_mlp_layernorm",
    "mlp",
    "linear_fc1",
    "linear_fc2",
    "final_layernorm",
    "output_layer",
)
_WITHOUT_INPUT_GRADIENT = ("embedding", "patch_embedding")
_MICRO_BATCH = {"forward-compute": "forward", "backward-compute": "backward"}


class Emitter(Protocol):
    """Where ranges go. `push` and `pop` nest on one thread; `start` and `end` may be on two."""

    def push(self, name: str) -> None: ...
    def pop(self) -> None: ...
    def start(self, name: str) -> Any: ...
    def end(self, handle: Any) -> None: ...


class NvtxEmitter:
    """Ranges that Nsight Systems records."""

    def push(self, name: str) -> None:
        torch.cuda.nvtx.range_push(PREFIX + name)

    def pop(self) -> None:
        torch.cuda.nvtx.range_pop()

    def start(self, name: str) -> Any:
        return torch.cuda.nvtx.range_start(PREFIX + name)

    def end(self, handle: Any) -> None:
        torch.cuda.nvtx.range_end(handle)


class TorchEmitter:
    """Ranges that torch.profiler records, on any device."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def push(self, name: str) -> None:
        self._open.append(self.start(name))

    def pop(self) -> None:
        self.end(self._open.pop())

    def start(self, name: str) -> Any:
        opened = torch.profiler.record_function(PREFIX + name)
        opened.__enter__()
        return opened

    def end(self, handle: Any) -> None:
        handle.__exit__(None, None, None)


class RangeTimers:
    """Takes the place of megatron-core's timers: its own marks of forward, backward, collectives and optimizer parts.
    Leaves out the barriers that it asks of timers: they would change the measurement."""

    def __init__(self, emitter: Emitter, *, after_backward: Callable[[], None]) -> None:
        self._emitter, self._after_backward = emitter, after_backward
        self._numbers: dict[str, int] = {}

    def new_step(self) -> None:
        """Count micro-batches from 0 again."""
        self._numbers.clear()

    def __call__(self, name: str, log_level: int = 0) -> "_RangeTimer":
        return _RangeTimer(self, name)

    def start(self, name: str) -> None:
        if (own := _MICRO_BATCH.get(name)) is None:
            self._emitter.push(f"mcore={name}")
            return
        number = self._numbers.get(own, 0)
        self._numbers[own] = number + 1
        self._emitter.push(f"{own}={number}")

    def stop(self, name: str) -> None:
        if name == "backward-compute":
            self._after_backward()
        self._emitter.pop()


class _RangeTimer:
    """One of them, with the two methods that megatron-core calls."""

    def __init__(self, timers: RangeTimers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        self._timers.start(self._name)

    def stop(self, barrier: bool = False) -> None:
        self._timers.stop(self._name)


class _BackwardRange:
    """From the first gradient that a module's output gets to that of its input."""

    def __init__(self, ranges: "ModuleRanges", name: str) -> None:
        self._ranges, self._name = ranges, name + BACKWARD
        self._handle: Any = None

    def begins_at(self, value: Any) -> None:
        for tensor in _with_gradient(value):
            tensor.register_hook(self._begin)

    def ends_at(self, value: Any) -> None:
        for tensor in _with_gradient(value):
            tensor.register_hook(self._end)

    def _begin(self, gradient: Tensor) -> None:
        if self._handle is None:
            self._handle = self._ranges.open(self._name)

    def _end(self, gradient: Tensor) -> None:
        if self._handle is not None:
            self._ranges.close(self._handle)
            self._handle = None


class ModuleRanges:
    """Ranges of layers, their parts and modalities, for as long as it is installed."""

    def __init__(self, chunks: Sequence[torch.nn.Module], emitter: Emitter) -> None:
        self._emitter = emitter
        self._calls: list[_BackwardRange] = []  # of the modules whose forward is running
        self._opened: dict[int, Any] = {}  # backward ranges, by a number of their own
        self._number = 0
        self._removals: list[Any] = []
        self._permuting: list[_BackwardRange] = []
        self._attending = 0  # forwards of self-attention that are running
        for chunk in chunks:
            for name, module in named_modules(chunk):
                self._watch(module, name)

    def remove(self) -> None:
        for handle in self._removals:
            handle.remove()
        self.close_all()

    def open(self, name: str) -> int:
        """Start a range that ends by close()."""
        self._number += 1
        self._opened[self._number] = self._emitter.start(name)
        return self._number

    def close(self, number: int) -> None:
        if (handle := self._opened.pop(number, None)) is not None:
            self._emitter.end(handle)

    def close_all(self) -> None:
        """End what autograd has not ended, in the order last in, first out."""
        for number in sorted(self._opened, reverse=True):
            self.close(number)

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        part = name.removeprefix("module=").split(".")[0]
        around: tuple[Any, Any] = {
            "self_attention": (self._attention_begins, self._attention_ends),
            "core_attention": (self._close_permutation, self._open_permutation),
            "linear_qkv": (None, self._open_permutation),
            "linear_proj": (self._close_permutation, None),
        }.get(part if name.endswith(part) else "", (None, None))
        before, after = around

        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if before is not None:
                before([*args, *kwargs.values()])
            self._emitter.push(name)
            call = _BackwardRange(self, name)
            call.ends_at([*args, *kwargs.values()])
            self._calls.append(call)

        def leave(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._calls.pop()
            has_end = any(True for _ in _with_gradient([*args, *kwargs.values()]))
            if has_end or part in _WITHOUT_INPUT_GRADIENT:
                call.begins_at(output)
            self._emitter.pop()
            if after is not None:
                after(output)

        self._removals += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def _attention_begins(self, inputs: Any) -> None:
        self._attending += 1

    def _attention_ends(self, output: Any) -> None:
        self._attending -= 1

    def _open_permutation(self, output: Any) -> None:
        if not self._attending or self._permuting:
            return  # a core attention that is computed again in the backward
        self._emitter.push("permutation")
        permuting = _BackwardRange(self, "permutation")
        permuting.ends_at(output)
        self._permuting.append(permuting)

    def _close_permutation(self, inputs: Any) -> None:
        if self._permuting and self._attending:
            self._emitter.pop()
            self._permuting.pop().begins_at(inputs)


def named_modules(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(name of its range, module) for every module that has one."""
    for path, module in chunk.named_modules():
        parent, own = ["", *path.split(".")][-2:]
        if own in MODULES:
            yield f"module={own}", module
        elif own in MODALITIES and parent in MODULES:
            yield f"module={parent}.{own}", module
        elif parent == "layers":
            yield f"layer={module.layer_number}", module


def _with_gradient(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors among a value and the items of a list or tuple that require a gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _with_gradient(item)
