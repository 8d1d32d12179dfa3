# SPDX-License-Identifier: Apache-2.0
"""The 7B recipes scaled down until a step takes seconds on a CPU, with their proportions kept.

Width and depth are chosen; heads, FFN and vocabulary follow so that attention, FFN and output layer keep about the
shares that they have in Qwen2.5-7B. `token_share` scales the tokens of an image, the text, the pack and its alignment
alike, so that as many samples share a pack as at full size. Trainable sets, image area, recomputation and optimizer are
the recipe's."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.recipes.shapes import qwen2_5_7b
from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig, SplitConfig
from tools.bench.report import BenchmarkError

STAGES = {"1": "eve7b_stage1", "2.1": "eve7b_stage2_1_ld", "2.2": "eve7b_stage2_2"}
"""Stage -> recipe. Not stage 3, which computes what 2.2 does: its official batches are of samples of like length."""

OFFICIAL_MICRO_BATCH = {"1": 8, "2.1": 4, "2.2": 2}
"""Samples that the official scripts put on one GPU at a time (0, 1.0 and 2: 8x1, 4x2, 2x2 for 1024, 1024, 512)."""

_HEAD_DIM = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much smaller than 7B."""

    hidden_size: int
    num_layers: int
    token_share: float


def scaled_model(split: SplitConfig, *, scale: Scale) -> ModelConfig:
    """Qwen2.5-7B's proportions at another width and depth.

    Raises: BenchmarkError for a width that is not a multiple of four heads.
    """
    if scale.hidden_size % (4 * _HEAD_DIM):
        raise BenchmarkError(
            f"hidden size {scale.hidden_size} is not a multiple of {4 * _HEAD_DIM} (four heads)."
        )
    full = qwen2_5_7b(split=split)
    narrower = scale.hidden_size / full.hidden_size
    heads = scale.hidden_size // _HEAD_DIM
    return dataclasses.replace(
        full,
        num_layers=scale.num_layers,
        hidden_size=scale.hidden_size,
        ffn_hidden_size=_multiple(full.ffn_hidden_size * narrower),
        num_attention_heads=heads,
        num_kv_heads=heads // 4,
        head_dim=_HEAD_DIM,
        # the output layer's work per token is vocabulary x width, a layer's width x width
        vocab_size=_multiple(full.vocab_size * narrower * scale.num_layers / full.num_layers),
        max_position_embeddings=8192,
        patch_stride=4,
        patch_embed_dim=_multiple(full.patch_embed_dim * narrower),
    )


def scaled_config(
    stage: str,
    *,
    scale: Scale,
    data_parallel: int = 1,
    dtype: Literal["bf16", "fp32"] = "fp32",
) -> RunConfig:
    """The stage's recipe with a scaled model and packs, on `data_parallel` processes."""
    recipe = RECIPES[STAGES[stage]]()
    align = max(8, _multiple(recipe.data.align * scale.token_share, of=8))
    pack_tokens = _multiple(recipe.data.pack_tokens * scale.token_share, of=align)
    return dataclasses.replace(
        recipe,
        model=scaled_model(recipe.model.split, scale=scale),
        data=dataclasses.replace(recipe.data, pack_tokens=pack_tokens, align=align),
        parallel=one_process(data_parallel),
        train=dataclasses.replace(recipe.train, dtype=dtype, backend="local"),
    )


def one_process(data_parallel: int = 1) -> ParallelConfig:
    """Data parallelism alone."""
    return ParallelConfig(
        num_nodes=1,
        gpus_per_node=data_parallel,
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        context=1,
        sequence_parallel=False,
        distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )


def _multiple(number: float, *, of: int = 128) -> int:
    return max(of, math.floor(number / of + 0.5) * of)
