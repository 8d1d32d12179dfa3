# SPDX-License-Identifier: Apache-2.0
"""The whole curriculum small enough for two CPU cores: a text stage that makes the LLM, then stages 1 to 3.

Each run has the shape of its 7B counterpart (what is trainable, which template, which weights it starts from) with
other numbers: two processes with tensor parallelism 2, fp32, and a batch counted in packs of 2,048 tokens, which are
always full. Sequence parallelism is off: over gloo its collectives cost more than the norms it spreads. The learning
rates are those of a small model trained from scratch, not the paper's. The text stage is short and gentle on purpose:
a small LLM that knows its text by heart takes four times as many captions to learn to see."""

from dataclasses import replace

from megatron_eve.config.recipes.shapes import qwen2_5_tiny
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


def eve_tiny_text() -> RunConfig:
    """The small LLM itself, from random weights, on the text of the demo's training set."""
    return _run(
        recipe="eve_tiny_text",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="text", trainable=("text",)),
        data=_data(shares={"text": 1.0}, template="plain"),
        steps=80,
        learning_rate=1e-3,
        weights=None,
        num_packs=2,
    )


def eve_tiny_stage1() -> RunConfig:
    """Stage 1: the patch embedding alone, on captions, in front of the frozen small LLM."""
    return _run(
        recipe="eve_tiny_stage1",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="1", trainable=("patch_embedding",)),
        data=_data(shares={"captions": 1.0}, template="plain", pack_tokens=1024),
        steps=60,
        learning_rate=1e-3,
        weights="runs/eve_tiny_text",
    )


def eve_tiny_stage2_1() -> RunConfig:
    """Stage 2.1: patch embedding and vision branch (a copy of the LLM), on captions."""
    return _run(
        recipe="eve_tiny_stage2_1",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.1", trainable=("patch_embedding", "vision")),
        data=_data(shares={"captions": 1.0}, template="plain", pack_tokens=1024),
        steps=150,
        learning_rate=1e-3,
        weights="runs/eve_tiny_stage1",
        copy_text_to_vision=True,
    )


def eve_tiny_stage2_2() -> RunConfig:
    """Stage 2.2: all weights, on captions and questions: with everything trainable the model learns to see.

    The learning rate does not fall to zero, because stage 3 goes on from it; captions keep their own short template."""
    return _run(
        recipe="eve_tiny_stage2_2",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.2", trainable=("patch_embedding", "vision", "text")),
        data=_data(shares={"captions": 0.85, "questions": 0.15}, template="qwen2"),
        steps=1100,
        learning_rate=7e-4,
        min_learning_rate=4e-4,
        weights="runs/eve_tiny_stage2_1",
    )


def eve_tiny_stage3() -> RunConfig:
    """Stage 3: all weights, on questions and answers, at half the learning rate."""
    return _run(
        recipe="eve_tiny_stage3",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="3", trainable=("patch_embedding", "vision", "text")),
        data=_data(shares={"questions": 1.0}, template="qwen2"),
        steps=600,
        learning_rate=5e-4,
        weights="runs/eve_tiny_stage2_2",
    )


def _data(
    *, shares: dict[str, float], template: TemplateName, pack_tokens: int = 2048
) -> DataConfig:
    return small_data(
        shares=shares,
        template=template,
        tokenizer="data/demo/tokenizer",
        pack_tokens=pack_tokens,
    )


def _run(
    *,
    recipe: str,
    split: SplitConfig,
    stage: StageConfig,
    data: DataConfig,
    steps: int,
    learning_rate: float,
    weights: str | None,
    min_learning_rate: float = 0.0,
    copy_text_to_vision: bool = False,
    num_packs: int = 1,
) -> RunConfig:
    return small_run(
        recipe=recipe,
        model=qwen2_5_tiny(split=split),
        stage=stage,
        data=data,
        parallel=replace(PARALLEL, tensor=2, distributed_optimizer=True),
        num_packs=num_packs,
        steps=steps,
        peak_lr=learning_rate,
        min_lr=min_learning_rate,
        patch_embedding_lr=learning_rate,
        checkpoint=CheckpointConfig(
            load_weights_from=weights,
            copy_text_to_vision=copy_text_to_vision,
            save_every_steps=200,
            keep_last=2,
            keep_every_steps=None,
            async_save=True,
        ),
        log_every_steps=20,
    )
