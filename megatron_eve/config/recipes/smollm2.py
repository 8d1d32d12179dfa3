# SPDX-License-Identifier: Apache-2.0
"""The curriculum on a real pretrained LLM that a laptop can hold: SmolLM2-135M-Instruct (Apache-2.0).

It needs no text stage: stage 1 starts from the converted weights. Two processes with interleaved pipeline parallelism:
its 9 heads do not divide by 2, and data parallelism would send a gigabyte of gradients a step. fp32, four packs of 512
tokens (about 160 captions) a step, 330 steps in all. Learning rates are those of a small model, far above the paper's
for 7B, and most of the steps are stage 2.1's: until some 10,000 captions have passed, the model sees nothing."""

from dataclasses import replace

from megatron_eve.config.recipes.shapes import smollm2_135m
from megatron_eve.config.recipes.small import PARALLEL, small_data, small_run
from megatron_eve.config.schema import (
    CheckpointConfig,
    DataConfig,
    RunConfig,
    SplitConfig,
    StageConfig,
    TemplateName,
)
from megatron_eve.config.variants import VARIANTS


def smollm2_stage1() -> RunConfig:
    """Stage 1: the patch embedding alone, on captions, in front of the frozen LLM."""
    return _run(
        recipe="smollm2_stage1",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="1", trainable=("patch_embedding",)),
        data=_data(shares={"captions": 1.0}, template="plain"),
        steps=15,
        peak_lr=1e-3,
        min_lr=1e-3,
        patch_embedding_lr=3e-3,
        weights="data/demo/weights/smollm2-135m-instruct",
    )


def smollm2_stage2_1() -> RunConfig:
    """Stage 2.1: patch embedding and vision branch (a copy of the LLM), on captions."""
    return _run(
        recipe="smollm2_stage2_1",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.1", trainable=("patch_embedding", "vision")),
        data=_data(shares={"captions": 1.0}, template="plain"),
        steps=200,
        peak_lr=1e-3,
        min_lr=5e-4,
        patch_embedding_lr=3e-3,
        weights="runs/smollm2_stage1",
        copy_text_to_vision=True,
    )


def smollm2_stage2_2() -> RunConfig:
    """Stage 2.2: all weights, on captions (with their own short template) and questions."""
    return _run(
        recipe="smollm2_stage2_2",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.2", trainable=("patch_embedding", "vision", "text")),
        data=_data(shares={"captions": 0.85, "questions": 0.15}, template="qwen2"),
        steps=75,
        peak_lr=5e-4,
        min_lr=2e-4,
        patch_embedding_lr=5e-4,
        weights="runs/smollm2_stage2_1",
    )


def smollm2_stage3() -> RunConfig:
    """Stage 3: all weights, on questions and answers, at a lower learning rate."""
    return _run(
        recipe="smollm2_stage3",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="3", trainable=("patch_embedding", "vision", "text")),
        data=_data(shares={"questions": 1.0}, template="qwen2"),
        steps=40,
        peak_lr=2e-4,
        min_lr=0.0,
        patch_embedding_lr=2e-4,
        weights="runs/smollm2_stage2_2",
    )


def _data(*, shares: dict[str, float], template: TemplateName) -> DataConfig:
    return small_data(
        shares=shares,
        template=template,
        tokenizer="data/demo/tokenizer-smollm2",
        pack_tokens=512,
    )


def _run(
    *,
    recipe: str,
    split: SplitConfig,
    stage: StageConfig,
    data: DataConfig,
    steps: int,
    peak_lr: float,
    min_lr: float,
    patch_embedding_lr: float,
    weights: str,
    copy_text_to_vision: bool = False,
) -> RunConfig:
    return small_run(
        recipe=recipe,
        model=smollm2_135m(split=split),
        stage=stage,
        data=data,
        parallel=replace(PARALLEL, pipeline=2, virtual_pipeline=3),
        num_packs=4,
        steps=steps,
        peak_lr=peak_lr,
        min_lr=min_lr,
        patch_embedding_lr=patch_embedding_lr,
        checkpoint=CheckpointConfig(
            load_weights_from=weights,
            copy_text_to_vision=copy_text_to_vision,
            save_every_steps=50,
            keep_last=1,
            keep_every_steps=None,
            async_save=True,
        ),
        log_every_steps=5,
    )
