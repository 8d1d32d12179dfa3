# SPDX-License-Identifier: Apache-2.0
"""Reads torch.profiler's trace (Kineto's Chrome trace events, schemaVersion 1), of a GPU or of a CPU.

On a GPU work is the events `kernel`, `gpu_memcpy` and `gpu_memset`, tied to the call that launched them by
`args.correlation`. A CPU has no kernels: there the training thread's time is divided among the innermost operators, and
the collectives are gloo's annotations on its own threads, from when an operation starts to when all peers have done
their part. Python and autograd's machinery between operators count as idle."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eve.metrics.captured import PREFIX

from .kinds import COPY, communication_kind, kernel_kind
from .trace import ProfileError, Range, Trace, Work

_ON_GPU = {"kernel": None, "gpu_memcpy": f"{COPY}: memcpy", "gpu_memset": f"{COPY}: memset"}
_LAUNCHES = ("cuda_runtime", "cuda_driver")
Event = dict[str, Any]


def read_kineto(path: Path, *, rank: int) -> Trace:
    """One rank's trace. Raises: ProfileError if the file is no trace of torch.profiler."""
    try:
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ProfileError(f"{path} is no trace of torch.profiler: {error}") from error
    complete = [event for event in events if event.get("ph") == "X" and "cat" in event]
    ranges = list(_ranges(complete))
    on_gpu = [event for event in complete if event["cat"] in _ON_GPU]
    work = list(_gpu_work(complete, on_gpu) if on_gpu else _cpu_work(complete, ranges))
    return Trace(
        rank=rank,
        device="cuda" if on_gpu else "cpu",
        source="torch.profiler",
        ranges=ranges,
        work=work,
    )


def _interval(event: Event) -> tuple[int, int]:
    """Microseconds with three decimals -> nanoseconds."""
    start = round(event["ts"] * 1000)
    return start, start + round(event["dur"] * 1000)


def _ranges(events: list[Event]) -> Iterator[Range]:
    for event in events:
        if event["cat"] == "user_annotation" and event["name"].startswith(PREFIX):
            start, end = _interval(event)
            name = event["name"].removeprefix(PREFIX)
            yield Range(name=name, start=start, end=end, thread=event["tid"])


def _gpu_work(events: list[Event], on_gpu: list[Event]) -> Iterator[Work]:
    launches = {
        event["args"]["correlation"]: (_interval(event)[0], event["tid"])
        for event in events
        if event["cat"] in _LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in on_gpu:
        start, end = _interval(event)
        arguments = event.get("args", {})
        launched_at, thread = launches.get(arguments.get("correlation"), (start, -1))
        yield Work(
            name=event["name"],
            kind=_ON_GPU[event["cat"]] or kernel_kind(event["name"]),
            start=start,
            end=end,
            lane=f"device {arguments.get('device')} stream {arguments.get('stream')}",
            launched_at=launched_at,
            launch_thread=thread,
        )


def _cpu_work(events: list[Event], ranges: list[Range]) -> Iterator[Work]:
    threads = {r.thread for r in ranges if r.name.startswith("step=")}
    for thread in threads:
        operators = [e for e in events if e["cat"] == "cpu_op" and e["tid"] == thread]
        for name, start, end in innermost(
            [(event["name"], *_interval(event)) for event in operators]
        ):
            if _computes(name):
                yield _on_thread(name, kernel_kind(name), start, end, thread=thread)
    for event in events:
        kind = communication_kind(event["name"]) if event["cat"] == "user_annotation" else None
        if kind is not None:
            # The training thread waits for it meanwhile, inside the range to which it belongs.
            caller = min(threads, default=event["tid"])
            lane = event["tid"]
            yield _on_thread(event["name"], kind, *_interval(event), thread=caller, lane=lane)


def _computes(operator: str) -> bool:
    """Not what only wraps operators or waits for a collective: autograd's nodes and Functions, c10d's calls."""
    return "::" in operator and not operator.startswith(("autograd::", "torch::autograd", "c10d::"))


def _on_thread(
    name: str, kind: str, start: int, end: int, *, thread: int, lane: int | None = None
) -> Work:
    return Work(
        name=name,
        kind=kind,
        start=start,
        end=end,
        lane=f"thread {lane or thread}",
        launched_at=start,
        launch_thread=thread,
    )


def innermost(operators: list[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """The time of nested (name, start, end) as pieces, each with the name of the innermost one that is running."""
    stack: list[tuple[str, int]] = []  # name, end
    now = 0
    for name, start, end in sorted(operators, key=lambda op: (op[1], -op[2])):
        while stack and stack[-1][1] <= start:
            inner, until = stack.pop()
            if until > now:
                yield inner, now, until
                now = until
        if stack and start > now:
            yield stack[-1][0], now, start
        now = max(now, start)
        stack.append((name, end))
    while stack:
        inner, until = stack.pop()
        if until > now:
            yield inner, now, until
            now = until
