# SPDX-License-Identifier: Apache-2.0
"""How fast a device works: the constants of the time model, assumed for a GPU that nobody measured, or calibrated.

A calibration file is JSON: what was measured and when, the constants, and how far each measured run lies from them."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_eve.errors import ConfigError
from megatron_eve.whole import write_json

from .cluster import Gpu

_GEMM_SHARE = 0.75  # of the peak, large products; Megatron-like runs reach 0.7 to 0.8
_ATTENTION_SHARE = 0.5
_MEMORY_SHARE = 0.8
_LINK_SHARE = 0.77  # 230 of 300 GB/s in ring collectives over NVLink
_GEMM_OVERHEAD_S = 12e-6  # a launch, and the last, partly filled wave of tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one rank. Times of a step are sums of amounts over rates, so a fit is linear in their inverses."""

    gemm_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    optimizer_bytes_per_s: float
    """Of Adam's state; slower than memory where its steps are no single kernel."""
    gemm_overhead_s: float  # a product of any size
    layer_overhead_s: float  # host time of one layer's forward and backward that no device hides
    step_overhead_s: float  # host time of a step
    link_share: float  # of a link's speed that collectives reach
    compute_overlaps: bool  # whether data-parallel collectives run beside the backward


def assumed(gpu: Gpu) -> Rates:
    """From the data sheet, by assumed shares, none of them measured with this code."""
    return Rates(
        gemm_flops_per_s=_GEMM_SHARE * gpu.peak_flops,
        attention_flops_per_s=_ATTENTION_SHARE * gpu.peak_flops,
        memory_bytes_per_s=_MEMORY_SHARE * gpu.memory_bytes_per_s,
        optimizer_bytes_per_s=_MEMORY_SHARE * gpu.memory_bytes_per_s,
        gemm_overhead_s=_GEMM_OVERHEAD_S,
        layer_overhead_s=0.0,
        step_overhead_s=0.02,
        link_share=_LINK_SHARE,
        compute_overlaps=True,
    )


def write_calibration(path: Path, *, rates: Rates, facts: dict[str, Any]) -> None:
    """`facts`: device, date, runs with their measured and fitted step times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**facts, "rates": asdict(rates)})


def read_calibration(path: Path) -> Rates:
    """Raises: ConfigError if the file is missing or is no calibration."""
    try:
        found = json.loads(path.read_text())["rates"]
        return Rates(**{field.name: found[field.name] for field in fields(Rates)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no calibration ({type(error).__name__}: {error}); make one with "
            "`python -m tools.plan calibrate RUN_DIR --out FILE`."
        ) from error
