# SPDX-License-Identifier: Apache-2.0
"""The figures of one rank's trace, and of a run from those of its captured ranks. Seconds are per step.

The window is the captured steps, without what lies between them. Its time is divided exactly:

    step time = compute + exposed communication + exposed copies + idle

where compute is the union of all work that is neither communication nor copy, exposed communication the part of
communication during which nothing is computed, exposed copies the copies outside both, and idle the rest. Time
by kind, by module and by kernel is summed over streams instead, so work that overlaps counts twice there."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .kinds import COMMUNICATION, COPY, placed_kind
from .trace import (
    Interval,
    Place,
    Step,
    Trace,
    Work,
    clip,
    intersection,
    length,
    places,
    steps,
    union,
)

TOP_KERNELS = 20
_PHASES = ("forward", "backward", "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedWork:
    """Work inside the window."""

    work: Work
    place: Place
    kind: str
    inside: int  # nanoseconds of it in the window


class RankFigures:
    """The figures of one rank's trace."""

    def __init__(self, trace: Trace) -> None:
        """Raises: ProfileError if the trace holds no step."""
        self.trace = trace
        self.steps: list[Step] = steps(trace)
        self.window = union((step.start, step.end) for step in self.steps)
        self.placed = [
            PlacedWork(
                work=work,
                place=place,
                kind=placed_kind(work.kind, module=place.module),
                inside=inside,
            )
            for work, place in zip(trace.work, places(trace), strict=True)
            if (inside := clip(work, self.window)) > 0
        ]

    @property
    def step_time_s(self) -> float:
        return sum(step.seconds for step in self.steps) / len(self.steps)

    def division(self) -> dict[str, float]:
        """Of the step time, as the module's docstring says; `communication_s` is the union of all of it."""
        communication = self._union(COMMUNICATION)
        copies = self._union(COPY)
        compute = self._union_of(
            item for item in self.placed if not item.kind.startswith((COMMUNICATION, COPY))
        )
        busy = union([*communication, *compute])
        everything = union([*busy, *copies])
        per_step = {
            "compute_s": length(compute),
            "communication_s": length(communication),
            "exposed_communication_s": length(busy) - length(compute),
            "copies_s": length(copies),
            "exposed_copies_s": length(everything) - length(busy),
            "idle_s": length(self.window) - length(everything),
        }
        return {name: self._seconds(value) for name, value in per_step.items()}

    def data_wait_s(self) -> float:
        """Time that the host waited for packs."""
        waits = [(r.start, r.end) for r in self.trace.ranges if r.name == "data_wait"]
        return self._seconds(length(intersection(union(waits), self.window)))

    def by_kind(self) -> dict[str, float]:
        """Seconds by kind of work, most first."""
        total: dict[str, int] = defaultdict(int)
        for item in self.placed:
            total[item.kind] += item.inside
        return self._descending(total)

    def by_module(self) -> list[dict[str, Any]]:
        """Seconds by module and phase, most first."""
        total = self._by_phase(lambda place: place.module)
        order = sorted(total, key=lambda module: -sum(total[module].values()))
        return [{"module": module, **self._phases(total[module], _PHASES)} for module in order]

    def by_modality(self) -> dict[str, float]:
        """Seconds in the modules that belong to one modality, and in all others."""
        total = dict.fromkeys(("vision", "text", "both"), 0)
        for item in self.placed:
            last = item.place.module.rsplit(".", 1)[-1]
            total[last if last in ("vision", "text") else "both"] += item.inside
        return {name: self._seconds(value) for name, value in total.items()}

    def by_layer(self) -> list[dict[str, Any]]:
        """Seconds by decoder layer and phase, in the layers' order."""
        total = self._by_phase(lambda place: place.layer)
        layers = sorted(layer for layer in total if layer is not None)
        return [{"layer": one, **self._phases(total[one], _PHASES[:2])} for one in layers]

    def top_kernels(self) -> list[dict[str, Any]]:
        """The kernels or operators that take most time: kind, calls a step, seconds a step, mean microseconds."""
        calls: dict[tuple[str, str], list[int]] = defaultdict(list)
        for item in self.placed:
            calls[item.work.name, item.kind].append(item.inside)
        order = sorted(calls, key=lambda key: -sum(calls[key]))[:TOP_KERNELS]
        return [
            {
                "name": name,
                "kind": kind,
                "calls": len(calls[name, kind]) / len(self.steps),
                "total_s": self._seconds(sum(calls[name, kind])),
                "mean_us": sum(calls[name, kind]) / len(calls[name, kind]) / 1e3,
            }
            for name, kind in order
        ]

    def _by_phase(self, key: Callable[[Place], Any]) -> dict[Any, dict[str, int]]:
        """Nanoseconds by a part of the place, and phase."""
        total: dict[Any, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_PHASES, 0))
        for item in self.placed:
            total[key(item.place)][item.place.phase] += item.inside
        return total

    def _phases(self, total: dict[str, int], names: Sequence[str]) -> dict[str, float]:
        return {f"{name}_s": self._seconds(total[name]) for name in names}

    def _union(self, kind: str) -> list[Interval]:
        return self._union_of(item for item in self.placed if item.kind.startswith(kind))

    def _union_of(self, items: Iterable[PlacedWork]) -> list[Interval]:
        return intersection(union((i.work.start, i.work.end) for i in items), self.window)

    def _seconds(self, nanoseconds: int) -> float:
        return nanoseconds / 1e9 / len(self.steps)

    def _descending(self, total: dict[str, int]) -> dict[str, float]:
        return {k: self._seconds(total[k]) for k in sorted(total, key=lambda k: -total[k])}


def mean_of(dicts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Value by value over the ranks; a name that a rank lacks counts as 0 there. In the order of the means."""
    names = {name for one in dicts for name in one}
    means = {name: sum(one.get(name, 0.0) for one in dicts) / len(dicts) for name in names}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def skew(values: dict[int, float]) -> dict[str, float]:
    """How far ranks are apart: the slowest rank, its value over the mean, and the fastest."""
    mean = sum(values.values()) / len(values)
    slowest = max(values, key=lambda rank: values[rank])
    fastest = min(values, key=lambda rank: values[rank])
    return {
        "slowest_rank": slowest,
        "slowest_s": values[slowest],
        "fastest_rank": fastest,
        "fastest_s": values[fastest],
        "slowest_over_mean": values[slowest] / mean if mean else 1.0,
    }
