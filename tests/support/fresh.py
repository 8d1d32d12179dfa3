# SPDX-License-Identifier: Apache-2.0
"""Freshly initialised weights, inside gloo workers."""

from megatron_eve.config.schema import RunConfig
from tests.support.save_weights import save_weights
from tests.support.train_once import build


def save_fresh(config: RunConfig, out: str) -> None:
    """Build the model without loading anything and save it."""
    chunks, *_ = build(config, weights=None)
    save_weights(chunks, out, config_text="")
