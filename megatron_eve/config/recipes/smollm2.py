# SPDX-License-Identifier: Apache-2.0
"""The curriculum on a real pretrained LLM that a laptop can hold: SmolLM2-135M-Instruct (Apache-2.0).

It needs no text stage: stage 1 starts from the converted weights. Two processes with interleaved pipeline parallelism:
its 9 heads do not divide by 2, and data parallelism would send a gigabyte of gradients a step. fp32, four packs of 512
tokens (about 160 captions) a step, 330 steps in all. Learning rates are those of a small model, far above the paper's
for 7B, and most of the steps are stage 2.1's: until some 10,000 captions have passed, the model sees nothing."""

from megatron_eve.config.recipes.shapes import smollm2_135m
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


def smollm2_stage1() -> RunConfig:
    """Stage 1: the patch embedding alone, on captions, in front of the frozen LLM."""
    return _run(
        recipe="smollm2_stage1",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="1", trainable=("patch_embedding",)),
        data=_data(shares={"captions": 1.0}, template="plain"),
        steps=15,
        learning_rates=(1e-3, 1e-3),
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
        learning_rates=(1e-3, 5e-4),
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
        learning_rates=(5e-4, 2e-4),
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
        learning_rates=(2e-4, 0.0),
        patch_embedding_lr=2e-4,
        weights="runs/smollm2_stage2_2",
    )


def _data(*, shares: dict[str, float], template: TemplateName) -> DataConfig:
    return DataConfig(
        sources=tuple(
            ShardSource(
                path=f"data/demo/{name}/shards",
                proportion=share,
                template="plain" if name == "captions" else None,
            )
            for name, share in shares.items()
        ),
        tokenizer="data/demo/tokenizer-smollm2",
        template=template,
        image_edge=128,
        max_aspect_ratio=4.0,
        max_text_tokens=256,
        pack_tokens=512,
        align=16,
        sample_align=1,
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
    learning_rates: tuple[float, float],  # peak and end of the cosine
    patch_embedding_lr: float,
    weights: str,
    copy_text_to_vision: bool = False,
) -> RunConfig:
    return RunConfig(
        recipe=recipe,
        run_dir=f"runs/{recipe}",
        model=smollm2_135m(split=split),
        stage=stage,
        data=data,
        parallel=ParallelConfig(
            num_nodes=1,
            gpus_per_node=2,
            tensor=1,
            pipeline=2,
            virtual_pipeline=3,
            context=1,
            sequence_parallel=False,
            distributed_optimizer=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        batch=BatchConfig(unit="packs", size=4),
        optim=OptimConfig(
            peak_lr=learning_rates[0],
            patch_embedding_lr=patch_embedding_lr,
            min_lr=learning_rates[1],
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
            save_every_steps=50,
            keep_last=1,
            keep_every_steps=None,
            async_save=True,
        ),
        logging=LoggingConfig(
            every_steps=5, tensorboard=False, wandb=False, wandb_project="megatron-eve"
        ),
    )
