# SPDX-License-Identifier: Apache-2.0
"""The result of both readers: one rank's ranges and work; and the arithmetic of intervals behind every figure.

`Work` is what the device did: kernels and copies on a GPU; on a CPU the innermost operators of the training thread and
gloo's collectives. `Range` is what the host was doing (megatron_eve/metrics/ranges.py). Work belongs to the ranges that
were open on the launching thread when it was launched. All times are integer nanoseconds of one clock."""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_eve.errors import DataError
from megatron_eve.metrics.captured import BACKWARD, PREFIX

Interval = tuple[int, int]


class ProfileError(DataError):
    """A capture is missing, empty or not what a reader expects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A named stretch of one host thread; the name without its prefix."""

    name: str
    start: int
    end: int
    thread: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One kernel, copy, operator or collective."""

    name: str
    kind: str  # see kinds.py
    start: int
    end: int
    lane: str  # stream, or thread
    launched_at: int
    launch_thread: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One rank's capture."""

    rank: int
    device: Literal["cuda", "cpu"]
    source: str  # "Nsight Systems" or "torch.profiler"
    ranges: list[Range]
    work: list[Work]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One captured step of a rank."""

    number: int
    start: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where work belongs."""

    module: str  # a module's or modality's name, permutation, optimizer, or what else of the step it was
    layer: int | None
    phase: Literal["forward", "backward", "other"]


def steps(trace: Trace) -> list[Step]:
    """The captured steps in their order. Raises: ProfileError if there is none."""
    found = [
        Step(number=int(r.name.removeprefix("step=")), start=r.start, end=r.end)
        for r in trace.ranges
        if r.name.startswith("step=")
    ]
    if not found:
        raise ProfileError(
            f"rank {trace.rank}: the trace holds no range {PREFIX}step=N; was it captured through profile.* of a run?"
        )
    return sorted(found, key=lambda step: step.start)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order; touching ones become one."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Sequence[Interval]) -> int:
    """Of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Points in both; each side disjoint and in order."""
    out: list[Interval] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            out.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return out


def clip(work: Work, window: Sequence[Interval]) -> int:
    """Nanoseconds of `work` inside disjoint, ordered intervals."""
    first = max(0, bisect.bisect_right(window, (work.start, work.start)) - 1)
    total = 0
    for start, end in window[first:]:
        if start >= work.end:
            break
        total += max(0, min(end, work.end) - max(start, work.start))
    return total


def places(trace: Trace) -> list[Place]:
    """The place of each of `trace.work`, in the same order."""
    by_thread: dict[int, list[Range]] = defaultdict(list)
    for item in trace.ranges:
        by_thread[item.thread].append(item)
    queries: dict[int, list[int]] = defaultdict(list)
    for index, work in enumerate(trace.work):
        queries[work.launch_thread].append(index)
    backward_threads = _backward_threads(trace)
    found: dict[int, Place] = {}
    for thread, indices in queries.items():
        indices.sort(key=lambda index: trace.work[index].launched_at)
        times = [trace.work[index].launched_at for index in indices]
        for index, names in zip(indices, _open_at(by_thread[thread], times), strict=True):
            found[index] = _place(names, in_backward_thread=thread in backward_threads)
    return [found[index] for index in range(len(trace.work))]


def _backward_threads(trace: Trace) -> set[int]:
    """Autograd's threads on a GPU: they hold ranges of backwards and no step."""
    backward = {r.thread for r in trace.ranges if r.name.endswith(BACKWARD)}
    return backward - {r.thread for r in trace.ranges if r.name.startswith("step=")}


def _open_at(ranges: list[Range], times: Sequence[int]) -> Iterator[list[str]]:
    """For each of the ascending `times` the names of the open ranges, the one opened last behind the others."""
    ordered = sorted(ranges, key=lambda r: (r.start, -r.end))
    active: list[Range] = []
    upcoming = 0
    for time in times:
        while upcoming < len(ordered) and ordered[upcoming].start <= time:
            active.append(ordered[upcoming])
            upcoming += 1
        active = [r for r in active if r.end > time]
        yield [r.name for r in active]


def _place(names: Sequence[str], *, in_backward_thread: bool) -> Place:
    module, layer = None, None
    phase: Literal["forward", "backward", "other"] = "backward" if in_backward_thread else "other"
    for name in names:
        bare = name.removesuffix(BACKWARD)
        kind, _, value = bare.partition("=")
        if kind in ("forward", "backward"):
            phase = kind  # type: ignore[assignment]
        if name.endswith(BACKWARD):
            phase = "backward"
        if kind == "layer":
            layer = int(value)
        if kind == "module":
            module = value
        elif kind in ("permutation", "optimizer", "data_wait"):
            module = kind
        elif kind == "layer":
            module = "layer: addition, concatenation"
        elif kind == "mcore" and module != "optimizer" and value != "forward-backward":
            module = value
    return Place(module=module or f"{phase}, outside of modules", layer=layer, phase=phase)
