# SPDX-License-Identifier: Apache-2.0
"""What the curricula for two CPU processes have in common: eve_tiny and smollm2 are these sections with their own
numbers laid over them."""

from megatron_eve.config.schema import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    ShardSource,
    StageConfig,
    TemplateName,
    TrainConfig,
)

PARALLEL = ParallelConfig(
    num_nodes=1,
    gpus_per_node=2,
    tensor=1,
    pipeline=1,
    virtual_pipeline=1,
    context=1,
    sequence_parallel=False,
    distributed_optimizer=False,
    overlap_grad_reduce=False,
    overlap_param_gather=False,
)


def small_data(
    *, shares: dict[str, float], template: TemplateName, tokenizer: str, pack_tokens: int
) -> DataConfig:
    """The demo's shards by their share of an epoch; captions keep their own short template."""
    return DataConfig(
        sources=tuple(
            ShardSource(
                path=f"data/demo/{name}/shards",
                proportion=share,
                template="plain" if name == "captions" else None,
            )
            for name, share in shares.items()
        ),
        tokenizer=tokenizer,
        template=template,
        image_edge=128,
        max_aspect_ratio=4.0,
        max_text_tokens=256,
        pack_tokens=pack_tokens,
        align=16,
        sample_align=1,
        open_bins=16,
        shuffle_block_size=4096,
        num_workers=2,
        prefetch_steps=2,
        seed=42,
    )


def small_run(
    *,
    recipe: str,
    model: ModelConfig,
    stage: StageConfig,
    data: DataConfig,
    parallel: ParallelConfig,
    num_packs: int,
    steps: int,
    peak_lr: float,
    min_lr: float,
    patch_embedding_lr: float,
    checkpoint: CheckpointConfig,
    log_every_steps: int,
) -> RunConfig:
    """A deterministic run in fp32 for so many steps of so many packs, cosine from `peak_lr` to `min_lr`."""
    return RunConfig(
        recipe=recipe,
        run_dir=f"runs/{recipe}",
        model=model,
        stage=stage,
        data=data,
        parallel=parallel,
        batch=BatchConfig(unit="packs", size=num_packs),
        optim=OptimConfig(
            peak_lr=peak_lr,
            patch_embedding_lr=patch_embedding_lr,
            min_lr=min_lr,
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
        checkpoint=checkpoint,
        logging=LoggingConfig(
            every_steps=log_every_steps,
            tensorboard=False,
            wandb=False,
            wandb_project="megatron-eve",
        ),
    )
