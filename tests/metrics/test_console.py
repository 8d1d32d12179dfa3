# SPDX-License-Identifier: Apache-2.0
"""The line of a step, letter by letter."""

import pytest

from megatron_eve.metrics.console import console_line, duration_text


def test_line_is_in_the_house_style() -> None:
    values = {
        "eta_s": 2 * 86400 + 4 * 3600 + 1800,
        "loss": 2.31416,
        "grad_norm": 0.8412,
        "lr": 9.7e-5,
        "tokens_per_s_per_gpu": 9310.4,
        "mfu": 0.4118,
        "fill": 0.9941,
        "memory_gib": 61.44,
        "data_wait_fraction": 0.0113,
        "samples": 1024.0,
    }
    assert console_line(values, step=1200, total_steps=58000) == (
        "step 1200/58000 | loss 2.3142 | grad 0.84 | lr 9.7e-5 | tok/s/gpu 9,310 | mfu 41.2% | "
        "fill 99.4% | mem 61.4 GiB | data 1.1% | eta 2d04h"
    )


def test_counts_of_what_should_not_happen_show_when_it_happened() -> None:
    """Samples that were masked since the line before, and steps that updated nothing."""
    none = console_line({"loss": 1.0, "quarantined": 0.0, "skipped": 0.0}, step=1, total_steps=2)
    some = console_line({"loss": 1.0, "quarantined": 1203.0, "skipped": 2.0}, step=1, total_steps=2)
    assert none == "step 1/2 | loss 1.0000"
    assert some == "step 1/2 | loss 1.0000 | quarantined 1,203 | skipped 2"


def test_columns_that_were_not_measured_are_left_out() -> None:
    assert console_line({"lr": 1e-4}, step=1, total_steps=2) == "step 1/2 | lr 1.0e-4"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (0.1, "0.10"), (0.0213, "2.1e-2"), (12.345, "12.35"), (float("nan"), "nan")],
)
def test_small_gradients_keep_their_digits(value: float, text: str) -> None:
    assert console_line({"grad_norm": value}, step=1, total_steps=1).endswith(f"grad {text}")


def test_learning_rate_of_zero_and_a_loss_that_is_not_finite_can_be_printed() -> None:
    line = console_line({"loss": float("inf"), "lr": 0.0}, step=1, total_steps=1)
    assert line == "step 1/1 | loss inf | lr 0.0e0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (725, "12m05s"),
        (3599.7, "1h00m"),
        (11_220, "3h07m"),
        (86_399.6, "1d00h"),
        (187_200, "2d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
