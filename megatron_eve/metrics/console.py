# SPDX-License-Identifier: Apache-2.0
"""The one line a step prints, for reading and for grep.

    step 1200/58000 | loss 2.3142 | grad 0.84 | lr 9.7e-5 | tok/s/gpu 9,310 | mfu 41.2% | fill 99.4% | data 1.1%

Columns whose metric a step does not log are left out; so are counts of what should not happen (_FAULTS) while they
are zero. Metrics without a column are in metrics.jsonl only."""

from collections.abc import Callable, Mapping

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def console_line(values: Mapping[str, float], *, step: int, total_steps: int) -> str:
    """The line of one step."""
    columns = [f"{label} {form(values[name])}" for name, label, form in _COLUMNS if name in values]
    columns += [f"{name} {values[name]:,.0f}" for name in _FAULTS if values.get(name)]
    return " | ".join([f"step {step}/{total_steps}", *columns])


def duration_text(seconds: float) -> str:
    """Seconds as the two largest units: 2d04h, 3h07m, 12m05s or 8s."""
    whole = round(seconds)
    if whole >= _DAY:
        return f"{whole // _DAY}d{whole % _DAY // _HOUR:02d}h"
    if whole >= _HOUR:
        return f"{whole // _HOUR}h{whole % _HOUR // _MINUTE:02d}m"
    if whole >= _MINUTE:
        return f"{whole // _MINUTE}m{whole % _MINUTE:02d}s"
    return f"{whole}s"


def _short(value: float) -> str:
    """Two decimals, or an exponent where they would show nothing."""
    return f"{value:.2f}" if value == 0 or not abs(value) < 0.1 else _exponent(value)


def _exponent(value: float) -> str:
    """9.7e-5 rather than 9.7e-05."""
    mantissa, separator, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if separator else mantissa


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", "{:.4f}".format),
    ("grad_norm", "grad", _short),
    ("lr", "lr", _exponent),
    ("tokens_per_s_per_gpu", "tok/s/gpu", "{:,.0f}".format),
    ("mfu", "mfu", _percent),
    ("fill", "fill", _percent),
    ("memory_gib", "mem", "{:.1f} GiB".format),
    ("data_wait_fraction", "data", _percent),
    ("eta_s", "eta", duration_text),
)
_FAULTS = ("quarantined", "unreadable", "read_retries", "skipped")
