# SPDX-License-Identifier: Apache-2.0
"""The 7B recipes scaled down until a step takes seconds on a CPU, with their proportions kept.

Width and depth are chosen; heads, FFN and vocabulary follow so that attention, FFN and output layer keep about the
shares that they have in Qwen2.5-7B. `token_share` scales the tokens of an image, the text, the pack and its alignment
alike, so that as many samples share a pack as at full size. Trainable sets, image area, recomputation and optimizer are
the recipe's; the loss is over all label tokens of a step, in both forms that are compared."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.recipes.shapes import qwen2_5_7b
from megatron_eve.config.schema import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SplitConfig,
)
from tools.bench.report import BenchmarkError

CURRICULUM = {
    "1": "eve7b_stage1",
    "2.1-ld": "eve7b_stage2_1_ld",
    "2.1-hd": "eve7b_stage2_1_hd",
    "2.2": "eve7b_stage2_2",
    "3": "eve7b_stage3",
}
"""Every run of the 7B curriculum -> recipe. Stage 2.1 is two runs, at 800^2 (LD) and at 1600^2 pixels (HD)."""

STAGES = {"1": "eve7b_stage1", "2.1": "eve7b_stage2_1_ld", "2.2": "eve7b_stage2_2"}
"""One recipe for each set of trained weights, where only that matters (2.1-hd trains what LD does, 3 what 2.2 does)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialBatch:
    """The batches of one official training script. All run on `OFFICIAL_GPUS` GPUs."""

    script: str  # baaivision/EVE, EVEv2/scripts/eve
    micro_batch: int  # samples on one GPU at a time, --per_device_train_batch_size
    accumulation: int  # --gradient_accumulation_steps
    grouped_by_length: bool = False  # --group_by_modality_length; else in random order

    @property
    def global_batch(self) -> int:
        """Samples of an optimizer step, and of the sampler's megabatch."""
        return self.micro_batch * self.accumulation * OFFICIAL_GPUS


OFFICIAL_GPUS = 128
"""NNODES=16 of 8 GPUs, in every script."""

OFFICIAL = {
    "1": OfficialBatch(script="0_eve7b_prealign_anyratio_ve.sh", micro_batch=8, accumulation=1),
    "2.1-ld": OfficialBatch(
        script="1.0_eve7b_prealign_anyratio_ve_moe.sh", micro_batch=4, accumulation=2
    ),
    "2.1-hd": OfficialBatch(
        script="1.1_eve7b_prealign_anyratio_ve_moe_hd.sh", micro_batch=2, accumulation=4
    ),
    "2.2": OfficialBatch(script="2_eve7b_fullalign_anyratio_hd.sh", micro_batch=2, accumulation=2),
    "3": OfficialBatch(
        script="3_eve7b_finetune_anyratio_hd.sh",
        micro_batch=2,
        accumulation=2,
        grouped_by_length=True,
    ),
}
"""Stage of CURRICULUM -> the script that runs it."""

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
    """The recipe of a stage of CURRICULUM or STAGES with a scaled model and packs, on `data_parallel` processes."""
    recipe = RECIPES[(CURRICULUM | STAGES)[stage]]()
    align = max(8, _multiple(recipe.data.align * scale.token_share, of=8))
    pack_tokens = _multiple(recipe.data.pack_tokens * scale.token_share, of=align)
    return dataclasses.replace(
        recipe,
        model=scaled_model(recipe.model.split, scale=scale),
        data=dataclasses.replace(recipe.data, pack_tokens=pack_tokens, align=align),
        parallel=one_process(data_parallel),
        optim=over_all_tokens(recipe.optim),
        train=dataclasses.replace(recipe.train, dtype=dtype, backend="local"),
    )


def over_all_tokens(optim: OptimConfig) -> OptimConfig:
    """The same with one weight for every label token: a benchmark's packs are not those of one step in data order."""
    return dataclasses.replace(optim, loss_normalization="global_tokens", loss_group_samples=None)


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
