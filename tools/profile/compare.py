# SPDX-License-Identifier: Apache-2.0
"""Two reports side by side, and whether the second is slower than allowed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_eve.errors import ConfigError

_SAME = ("recipe", "device", "dtype", "world_size", "parallel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One figure before and after; seconds, or a rate."""

    name: str
    before: float
    after: float

    @property
    def ratio(self) -> float | None:
        """After over before; None where there was nothing before."""
        return self.after / self.before if self.before else None


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes two reports hard to compare: fields of the runs that differ."""
    return [
        f"{name} was {before[name]}, is {after[name]}"
        for name in _SAME
        if before[name] != after[name]
    ]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Step time, throughput, the division of the step, then kinds and modules by how much they changed."""
    fixed = [
        _change("step time", before["step_time_s"], after["step_time_s"]),
        _change(
            "tokens/s per device",
            before["throughput"]["tokens_per_s_per_gpu"],
            after["throughput"]["tokens_per_s_per_gpu"],
        ),
        *_of("", before["time"], after["time"]),
    ]
    moving = [
        *_of("kind: ", before["kinds"], after["kinds"]),
        *_of("module: ", _modules(before), _modules(after)),
    ]
    return [*fixed, *sorted(moving, key=lambda c: -abs(c.after - c.before))]


def _change(name: str, before: float, after: float) -> Change:
    return Change(name=name, before=before, after=after)


def _of(prefix: str, before: dict[str, float], after: dict[str, float]) -> list[Change]:
    names = [*before, *(name for name in after if name not in before)]
    return [
        _change(
            prefix + name.removesuffix("_s").replace("_", " "),
            before.get(name, 0.0),
            after.get(name, 0.0),
        )
        for name in names
    ]


def _modules(report: dict[str, Any]) -> dict[str, float]:
    return {
        row["module"]: row["forward_s"] + row["backward_s"] + row["other_s"]
        for row in report["modules"]
    }


def parse_share(text: str) -> float:
    """`5%` or `0.05` -> 0.05. Raises: ConfigError for anything else, below 0, and for a bare number from 1 on: `5`,
    meant as 5%, would allow six times the time."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < (math.inf if percent else 1):
        raise ConfigError(f"--fail-over {text} is not a share; write 5% or 0.05.")
    return share


def is_report(value: Any) -> bool:
    """Whether a file's content can be compared: the fields read here, and tokens per second above zero."""
    if not isinstance(value, Mapping):
        return False
    sections = ("throughput", "time", "kinds", "modules", "step_time_s", *_SAME)
    if any(name not in value for name in sections) or not isinstance(value["throughput"], Mapping):
        return False
    rate = value["throughput"].get("tokens_per_s_per_gpu")
    return isinstance(rate, float | int) and math.isfinite(rate) and rate > 0


def slower_by(before: dict[str, Any], after: dict[str, Any]) -> float:
    """How much longer a useful token takes on a device, as a share of before: packs of two captures differ in fill."""
    rates = [report["throughput"]["tokens_per_s_per_gpu"] for report in (before, after)]
    return float(rates[0] / rates[1] - 1)


def comparison_table(found: list[Change], *, limit: int) -> str:
    """Markdown, milliseconds for times."""
    lines = ["| figure | before | after | after / before |", "|---|---|---|---|"]
    for change in found[:limit]:
        scale = 1.0 if change.name.startswith("tokens/s") else 1e3
        ratio = "new" if change.ratio is None else f"{change.ratio:.3f}"
        lines.append(
            f"| {change.name} | {scale * change.before:,.3f} | {scale * change.after:,.3f} | {ratio} |"
        )
    return "\n".join(lines)
