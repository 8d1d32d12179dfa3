# SPDX-License-Identifier: Apache-2.0
"""Modality-partitioned modules: one instance of a backend's own module per modality, each applied to its own rows.

A token passes through one branch only. The official code (EVEv2 modeling_qwen2.py:81-84) runs both branches on all
tokens and blends them by a mask; forward and gradients are equal (tests/model/test_partitioned.py), the work is half,
and 0 * Inf cannot leak NaN from the unused branch.

Owning two stock modules instead of one stacked weight keeps everything the backend does for its module: tensor and
sequence parallelism, frozen weights without weight gradient, FP8 state of its own, sharded checkpoints. Rows are
`[vision | text]` along dim 0, so that both inputs are views.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.mlp import MLP, apply_swiglu_sharded_factory
from torch import Tensor

MODALITIES = ("vision", "text")


class ModalityPartitioned(MegatronModule):
    """Base of modules with one `.vision` and one `.text` instance of the same kind.

    `num_vision_rows` of a forward call is the number of leading rows of its input that are vision tokens: this rank's
    rows where the input is sharded over the sequence, all of the pack's where it is not."""

    def __init__(self, config: Any, *, build: Callable[[], torch.nn.Module]) -> None:
        super().__init__(config)
        self.vision = build()
        self.text = build()


def segments(x: Tensor, num_vision_rows: int) -> tuple[Tensor, Tensor]:
    """Vision and text rows of [rows, ...], as views.

    One split instead of two slices: its backward concatenates the two gradients, where each slice's would fill a tensor
    of the full size with zeros, and autograd would then add these."""
    vision, text = x.split([num_vision_rows, x.shape[0] - num_vision_rows])
    return vision, text


class ModalityPartitionedLinear(ModalityPartitioned):
    """Two column- or row-parallel linears. Called like them by megatron-core's builders; `branch` is their class.

    Raises: ValueError for a bias that would go back to the caller (Qwen2.5 has none on row-parallel linears).
    """

    def __init__(
        self, input_size: int, output_size: int, *, branch: type, config: Any, **kwargs: Any
    ) -> None:
        if kwargs.get("bias") and kwargs.get("skip_bias_add"):
            raise ValueError(
                "a modality-partitioned linear adds its bias itself; skip_bias_add must be False"
            )
        super().__init__(
            config, build=lambda: branch(input_size, output_size, config=config, **kwargs)
        )

    def forward(self, x: Tensor, num_vision_rows: int) -> tuple[Tensor, None]:
        """[rows_in, 1, in] -> [rows_out, 1, out]; under sequence parallelism a column-parallel linear gathers and a
        row-parallel one scatters each segment by itself."""
        vision, text = segments(x, num_vision_rows)
        return torch.cat([self.vision(vision)[0], self.text(text)[0]]), None

    def backward_dw(self) -> None:
        """Delayed weight gradients of both branches (a no-op for megatron-core's own linears)."""
        for branch in (self.vision, self.text):
            branch.backward_dw()  # type: ignore[operator]


class ModalityPartitionedNorm(ModalityPartitioned):
    """Two norms; `branch` is their class."""

    def __init__(self, config: Any, hidden_size: int, eps: float, *, branch: type) -> None:
        super().__init__(
            config, build=lambda: branch(config=config, hidden_size=hidden_size, eps=eps)
        )

    def forward(self, x: Tensor, num_vision_rows: int) -> Tensor:
        """[rows, 1, h] -> the same shape."""
        vision, text = segments(x, num_vision_rows)
        return torch.cat([self.vision(vision), self.text(text)])


class ModalityPartitionedMLP(MLP):
    """SwiGLU whose two linears are partitioned; the segments stay apart between them and meet at width h."""

    def forward(self, x: Tensor, num_vision_rows: int) -> tuple[Tensor, None]:
        """[rows, 1, h] -> [rows, 1, h]; `num_vision_rows` counts rows of the (sharded) input."""
        vision, text = segments(x, num_vision_rows)
        return torch.cat([self._branch(vision, "vision"), self._branch(text, "text")]), None

    def _branch(self, x: Tensor, modality: str) -> Tensor:
        gate_up, _ = getattr(self.linear_fc1, modality)(x)
        gate, up = gate_up.chunk(2, dim=-1)
        return getattr(self.linear_fc2, modality)(F.silu(gate) * up)[0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """As MLP's. Its factory, which keeps gate and up apart when the tensor-parallel size changes, knows only the
        name `linear_fc1.weight`; without it a checkpoint loads at another size silently wrong."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for modality in MODALITIES:
            name = f"{prefix}linear_fc1.{modality}.weight"
            sharded[name] = apply_swiglu_sharded_factory(sharded[name], sharded_offsets)
        return sharded


def apply_partitioned(module: torch.nn.Module, x: Tensor, num_vision_rows: int) -> Any:
    """Call a module that may or may not be split by modality."""
    if isinstance(module, ModalityPartitioned | ModalityPartitionedMLP):
        return module(x, num_vision_rows)
    return module(x)
