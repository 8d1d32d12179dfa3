# SPDX-License-Identifier: Apache-2.0
"""Every metric of a run, declared once: its name (the key in metrics.jsonl), unit, and how ranks' values become one.

Reductions run over the data-parallel ranks, which see different packs; ranks of one model copy see the same. `same`:
the value is already the same on every rank (a global loss, a learning rate, a rate computed after the reduction)."""

from dataclasses import dataclass
from typing import Literal

Reduction = Literal["sum", "max", "same"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number that a step can log."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str


_ALL = (
    Metric(
        name="loss",
        unit="nats/token",
        reduction="same",
        meaning="cross entropy over the label tokens of the global batch",
    ),
    Metric(
        name="grad_norm",
        unit="1",
        reduction="same",
        meaning="global norm of the gradient before clipping",
    ),
    Metric(name="lr", unit="1", reduction="same", meaning="learning rate of the decoder"),
    Metric(
        name="patch_embedding_lr",
        unit="1",
        reduction="same",
        meaning="learning rate of the patch embedding",
    ),
    Metric(name="samples", unit="samples", reduction="sum", meaning="samples trained on"),
    Metric(name="packs", unit="packs", reduction="sum", meaning="packs that hold a sample"),
    Metric(
        name="vision_tokens",
        unit="tokens",
        reduction="sum",
        meaning="vision tokens without padding",
    ),
    Metric(
        name="text_tokens", unit="tokens", reduction="sum", meaning="text tokens without padding"
    ),
    Metric(
        name="label_tokens", unit="tokens", reduction="sum", meaning="tokens that carry a label"
    ),
    Metric(
        name="computed_tokens", unit="tokens", reduction="sum", meaning="tokens with all padding"
    ),
    Metric(
        name="quarantined",
        unit="samples",
        reduction="sum",
        meaning="samples refused while decoding",
    ),
    Metric(name="step_time_s", unit="s", reduction="max", meaning="time of one step, on average"),
    Metric(
        name="data_wait_s",
        unit="s",
        reduction="max",
        meaning="time of one step spent waiting for data, on average",
    ),
    Metric(
        name="memory_gib",
        unit="GiB",
        reduction="max",
        meaning="peak memory of the device allocated",
    ),
    Metric(
        name="tokens_per_s_per_gpu",
        unit="tokens/s",
        reduction="same",
        meaning="tokens without padding, per second and process",
    ),
    Metric(name="fill", unit="fraction", reduction="same", meaning="tokens that are not padding"),
    Metric(
        name="data_wait_fraction",
        unit="fraction",
        reduction="same",
        meaning="share of the step spent waiting for data",
    ),
    Metric(name="eta_s", unit="s", reduction="same", meaning="time left at the present speed"),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
