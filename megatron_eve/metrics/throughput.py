# SPDX-License-Identifier: Apache-2.0
"""Counts what a rank does between two logged steps, and turns the reduced counts into rates.

    meter.add_step(packs, step_time_s=..., data_wait_s=...)      every step, no synchronisation
    counts = reduce_over_ranks(meter.take(), group=..., device=...)    at a logged step
    values |= counts | rates(counts, world_size=..., steps_left=...)

Token and sample counts are those of one step on average over the interval, so that a longer `logging.every_steps` does
not change their meaning."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_eve.data.sample import Pack


@dataclass(kw_only=True, slots=True)
class StepMeter:
    """Sums of one data-parallel rank since the last `take`."""

    _num_steps: int = 0
    _sums: dict[str, float] = field(default_factory=dict)

    def add_step(self, packs: Iterable[Pack], *, step_time_s: float, data_wait_s: float) -> None:
        """Count one step of this rank. `step_time_s` includes `data_wait_s`."""
        self._num_steps += 1
        self._add("step_time_s", step_time_s)
        self._add("data_wait_s", data_wait_s)
        for pack in packs:
            self._add("packs", 1 if pack.sample_ids else 0)
            self._add("samples", len(pack.sample_ids))
            self._add("vision_tokens", pack.num_real_vision)
            self._add("text_tokens", pack.num_real_text)
            self._add("label_tokens", pack.label_targets.numel())
            self._add("computed_tokens", pack.num_tokens)
            self._add("quarantined", len(pack.quarantined))

    def take(self) -> dict[str, float]:
        """Averages per step since the last call; starts anew.

        The names are the same on every rank. Raises: ValueError if no step was added since.
        """
        if self._num_steps == 0:
            raise ValueError("no step was added since the last take()")
        averages = {name: self._sums.get(name, 0.0) / self._num_steps for name in _COUNTED}
        self._num_steps, self._sums = 0, {}
        return averages

    def _add(self, name: str, amount: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + amount


_COUNTED = (
    "samples",
    "packs",
    "vision_tokens",
    "text_tokens",
    "label_tokens",
    "computed_tokens",
    "quarantined",
    "step_time_s",
    "data_wait_s",
)


def rates(counts: Mapping[str, float], *, world_size: int, steps_left: int) -> dict[str, float]:
    """Speed, fill, share of waiting and time left, from counts reduced over the data-parallel ranks."""
    useful = counts["vision_tokens"] + counts["text_tokens"]
    seconds = counts["step_time_s"]
    return {
        "tokens_per_s_per_gpu": useful / seconds / world_size,
        "fill": useful / counts["computed_tokens"],
        "data_wait_fraction": counts["data_wait_s"] / seconds,
        "eta_s": steps_left * seconds,
    }
