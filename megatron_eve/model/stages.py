# SPDX-License-Identifier: Apache-2.0
"""Which weights a stage trains. Groups, not substrings of names: see TrainableGroup in config/schema.py."""

from collections.abc import Iterable

import torch

from megatron_eve.config.schema import TrainableGroup


def group_of(name: str) -> TrainableGroup:
    """The trainable group of the parameter `name` of an EveModel."""
    parts = name.split(".")
    if "patch_embedding" in parts:
        return "patch_embedding"
    return "vision" if "vision" in parts else "text"


def freeze(chunks: Iterable[torch.nn.Module], *, trainable: tuple[TrainableGroup, ...]) -> None:
    """Make exactly the parameters of `trainable` require gradients.

    Must run before the model is wrapped for data parallelism: gradient buffers hold trainable parameters only."""
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            param.requires_grad_(group_of(name) in trainable)
