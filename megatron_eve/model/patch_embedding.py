# SPDX-License-Identifier: Apache-2.0
"""From pixels to vision tokens: Conv(16, 16), GELU, Conv(2, 2) on non-overlapping windows, as two matrix products.

Source: EVEv2 multimodal_encoder/vision_tokenizer.py:20-42. The windows do not overlap, so that a convolution is a
linear on patches; all images of a pack go through at once, whatever their sizes. Parameters keep the convolutions'
shapes. Legend: P patch tokens, R vision rows of this rank, h hidden size, p patch_stride, d dense_stride.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_eve.config.pixels import CLIP_MEAN as CLIP_MEAN
from megatron_eve.config.pixels import CLIP_STD as CLIP_STD
from megatron_eve.config.schema import ModelConfig


class _WindowLinear(torch.nn.Module):
    """A convolution on one window. PyTorch's default initialisation of convolutions, U(+-1/sqrt(fan_in)).

    A module with a forward of its own, because the overlapped parameter gather waits for weights when their module is
    called."""

    def __init__(
        self, shape: tuple[int, int, int, int], *, config: Any, generator: torch.Generator
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(shape[1] * shape[2] * shape[3])
        device = torch.cuda.current_device()
        weight = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(shape[0]).uniform_(-bound, bound, generator=generator)
        self.weight = torch.nn.Parameter(weight.to(device, config.params_dtype))
        self.bias = torch.nn.Parameter(bias.to(device, config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in * kh * kw], a window channel by channel -> [..., out]."""
        return F.linear(x, self.weight.flatten(1), self.bias)


class PatchEmbedding(MegatronModule):
    """Embeds this rank's vision rows.

    Under sequence parallelism every tensor-parallel rank embeds its own rows only, so all gradients are partial sums
    (attribute `sequence_parallel`); without it all ranks compute the same."""

    def __init__(self, config: Any, *, model: ModelConfig, seed: int) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(seed)  # the same on every rank
        p, d, width = model.patch_stride, model.dense_stride, model.patch_embed_dim
        self.patch_pixels = p * p
        self.conv1 = _WindowLinear((width, 3, p, p), config=config, generator=generator)
        self.conv2 = _WindowLinear(
            (model.hidden_size, width, d, d), config=config, generator=generator
        )
        device = torch.cuda.current_device()
        for name in ("class_embedding", "split_embedding"):
            # The official code draws both with standard deviation 1 (vision_tokenizer.py:27-28).
            value = torch.randn(model.hidden_size, generator=generator)
            setattr(self, name, torch.nn.Parameter(value.to(device, config.params_dtype)))
        for param in self.parameters():
            param.sequence_parallel = config.sequence_parallel

    def forward(self, patches: Tensor, *, sources: Tensor) -> Tensor:
        """Embed patches and put CLS, SPL and zero rows in their places.

        Shapes: patches [P, d * d, 3 * p * p] uint8; sources [R] int64: the patch of each row, or P for CLS, P + 1 for
        SPL, P + 2 for a zero row -> [R, 1, h].
        """
        features = self._embed(self._normalise(patches))
        special = [
            self.class_embedding,
            self.split_embedding,
            torch.zeros_like(self.class_embedding),
        ]
        table = torch.cat([features, torch.stack(special)])
        return table.index_select(0, sources).unsqueeze(1)

    def _normalise(self, patches: Tensor) -> Tensor:
        mean = torch.tensor(CLIP_MEAN, device=patches.device).repeat_interleave(self.patch_pixels)
        std = torch.tensor(CLIP_STD, device=patches.device).repeat_interleave(self.patch_pixels)
        return ((patches.float() / 255 - mean) / std).to(self.conv1.weight.dtype)

    def _embed(self, pixels: Tensor) -> Tensor:
        """[P, d * d, 3 * p * p] -> [P, h]; the d * d sub-patches of a token lie in reading order."""
        hidden = F.gelu(self.conv1(pixels))  # [P, d * d, width]
        return self.conv2(hidden.transpose(1, 2).flatten(1))
