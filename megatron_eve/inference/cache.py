# SPDX-License-Identifier: Apache-2.0
"""Keys and values of the tokens so far: one buffer per layer, allocated once, one row for each request in flight.

Row r holds its request's tokens at 0 .. length - 1, no padding in front: an index is a position. The rows in use are
always 0 .. n - 1: a finished request gives its row to the last one (`move`).

Legend: R rows, G key/value heads, C tokens that a row can hold, D head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_eve.config.schema import ModelConfig


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """`keys[layer]` and `values[layer]` are [R, G, C, D]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def empty(
        cls, model: ModelConfig, *, rows: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> "KeyValueCache":
        """Memory for `rows` requests of `tokens` tokens each, prompt and answer together. Zeros: attention weighs a
        hidden place by zero, and 0 * NaN is NaN."""
        shape = (rows, model.num_kv_heads, tokens, model.head_dim)

        def buffers() -> tuple[Tensor, ...]:
            layers = range(model.num_layers)
            return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in layers)

        return cls(buffers(), buffers())

    def clear(self) -> None:
        """Zeros again, in the same memory."""
        for buffer in (*self.keys, *self.values):
            buffer.zero_()

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    @property
    def tokens(self) -> int:
        """C."""
        return self.keys[0].shape[2]

    def store_prompt(self, layer: int, *, row: int, keys: Tensor, values: Tensor) -> None:
        """Write [G, n, D] of a whole prompt to the beginning of a row."""
        length = keys.shape[1]
        self.keys[layer][row, :, :length] = keys
        self.values[layer][row, :, :length] = values

    def append(self, layer: int, *, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write [n, G, D] of one token for each of the rows 0 .. n - 1, each at its own position [n]."""
        rows = torch.arange(len(positions), device=positions.device)
        self.keys[layer][rows, :, positions] = keys
        self.values[layer][rows, :, positions] = values

    def move(self, *, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row to another row."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]


def cache_bytes(model: ModelConfig, *, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """The memory that `empty` takes."""
    per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize
    return rows * tokens * per_token
