# SPDX-License-Identifier: Apache-2.0
"""The whole curriculum small enough for two CPU cores: a text stage that makes the LLM, then stages 1 to 3.

Each run has the shape of its 7B counterpart (what is trainable, which template, which weights it starts from) with
other numbers: two processes with tensor and sequence parallelism 2, fp32, packs of 512 tokens. The learning rates are
those of a small model trained from scratch, not the paper's."""

from megatron_eve.config.recipes.shapes import qwen2_5_tiny
from megatron_eve.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ShardSource,
    SplitConfig,
    StageConfig,
    TemplateName,
    TrainConfig,
)
from megatron_eve.config.variants import VARIANTS


def eve_tiny_text() -> RunConfig:
    """The small LLM itself, from random weights, on the text of the demo's training set."""
    return _run(
        recipe="eve_tiny_text",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="text", trainable=("text",)),
        data=_data(shards="text", template="qwen2"),
        steps=300,
        learning_rate=2e-3,
        weights=None,
    )


def eve_tiny_stage1() -> RunConfig:
    """Stage 1: the patch embedding alone, on captions, in front of the frozen small LLM."""
    return _run(
        recipe="eve_tiny_stage1",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="1", trainable=("patch_embedding",)),
        data=_data(shards="captions", template="plain"),
        steps=200,
        learning_rate=2e-3,
        weights="runs/eve_tiny_text",
    )


def eve_tiny_stage2_1() -> RunConfig:
    """Stage 2.1: patch embedding and vision branch (a copy of the LLM), on captions."""
    return _run(
        recipe="eve_tiny_stage2_1",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.1", trainable=("patch_embedding", "vision")),
        data=_data(shards="captions", template="plain"),
        steps=300,
        learning_rate=1e-3,
        weights="runs/eve_tiny_stage1",
        copy_text_to_vision=True,
    )


def eve_tiny_stage2_2() -> RunConfig:
    """Stage 2.2: all weights, on questions and answers."""
    return _run(
        recipe="eve_tiny_stage2_2",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.2", trainable=("patch_embedding", "vision", "text")),
        data=_data(shards="questions", template="qwen2"),
        steps=300,
        learning_rate=1e-3,
        weights="runs/eve_tiny_stage2_1",
    )


def eve_tiny_stage3() -> RunConfig:
    """Stage 3: all weights, on questions and answers, at half the learning rate."""
    return _run(
        recipe="eve_tiny_stage3",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="3", trainable=("patch_embedding", "vision", "text")),
        data=_data(shards="questions", template="qwen2"),
        steps=200,
        learning_rate=5e-4,
        weights="runs/eve_tiny_stage2_2",
    )


def _data(*, shards: str, template: TemplateName) -> DataConfig:
    return DataConfig(
        sources=(ShardSource(path=f"data/demo/{shards}/shards", proportion=1.0),),
        tokenizer="data/demo/tokenizer",
        template=template,
        image_edge=256,
        max_aspect_ratio=4.0,
        max_text_tokens=256,
        pack_tokens=512,
        align=16,
        open_bins=16,
        shuffle_block_size=4096,
        num_workers=2,
        prefetch_steps=2,
        seed=42,
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
    copy_text_to_vision: bool = False,
) -> RunConfig:
    return RunConfig(
        recipe=recipe,
        run_dir=f"runs/{recipe}",
        model=qwen2_5_tiny(split=split),
        stage=stage,
        data=data,
        parallel=ParallelConfig(
            num_nodes=1,
            gpus_per_node=2,
            tensor=2,
            pipeline=1,
            virtual_pipeline=1,
            context=1,
            sequence_parallel=True,
            distributed_optimizer=True,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        batch=BatchConfig(unit="samples", size=64),
        optim=OptimConfig(
            peak_lr=learning_rate,
            patch_embedding_lr=learning_rate,
            min_lr=0.0,
            warmup_fraction=0.03,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            weight_decay=0.0,
            clip_grad=1.0,
            loss_normalization="global_tokens",
        ),
        train=TrainConfig(
            steps=steps,
            epochs=None,
            dtype="fp32",
            backend="local",
            recompute="none",
            seed=42,
            deterministic=True,
            distributed_timeout_s=300,
        ),
        checkpoint=CheckpointConfig(
            load_weights_from=weights,
            copy_text_to_vision=copy_text_to_vision,
            save_every_steps=100,
            keep_last=2,
        ),
        logging=LoggingConfig(
            every_steps=10, tensorboard=False, wandb=False, wandb_project="megatron-eve"
        ),
    )
