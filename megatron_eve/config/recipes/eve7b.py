# SPDX-License-Identifier: Apache-2.0
"""EVEv2-7B on Qwen2.5-7B-Instruct: the five runs of the paper on 16 nodes x 8 GPUs.

Numbers: EVEv2 paper (arXiv 2502.06788) Table 5, and the official scripts (baaivision/EVE, EVEv2/scripts/eve) for what
the table leaves out; where the two differ the paper's value stands here and the docstring names the other.
Same in all five: AdamW (0.9, 0.999, 1e-8), no weight decay, linear warm-up over 3% of the steps, cosine to 0, one
epoch, bf16, no gradient clipping (the scripts' DeepSpeed files switch none on), one learning rate for both groups, seed
42, text cut to the scripts' `model_max_length`.

The loss is the official one, too: the mean over the script's micro-batches of 8, 4, 2, 2 and 2 samples of each one's
token mean (`optim.loss_group_samples`), however samples are packed.

Ours, not the paper's: packs instead of padded samples (8,192 tokens at 800^2 pixels, 16,384 at 1600^2), the
aspect-ratio limit (the official code has none), stage 3's samples in random order (below), tensor parallelism 4 with
sequence parallelism inside a node (official: ZeRO-3), a checkpoint every 1,000 steps of which 3 are kept (official:
4,000 and 10)."""

from megatron_eve.config.recipes.shapes import qwen2_5_7b
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


def eve7b_stage1() -> RunConfig:
    """Stage 1: the patch embedding alone, on a dense decoder, 10M images of DataComp-1B.

    Script 0_eve7b_prealign_anyratio_ve.sh (there: stage 0), about 9.8k steps. Starts from the converted LLM.
    """
    return _run(
        recipe="eve7b_stage1",
        split=VARIANTS["eve-v1.0"],
        stage=StageConfig(name="1", trainable=("patch_embedding",)),
        data=_data(shards="datacomp1b-10m", template="plain", image_edge=800, max_text_tokens=2048),
        batch_size=1024,
        micro_batch=8,
        learning_rate=2e-4,
        weights="data/weights/qwen2.5-7b-instruct",
    )


def eve7b_stage2_1_ld() -> RunConfig:
    """Stage 2.1, low definition: patch embedding and vision branch, 29M images of DataComp-1B at 800^2 pixels.

    Script 1.0 (its data file says 30m), about 28k steps. The vision branch starts as a copy of the LLM, made while
    loading (official: the extra program repeat_moe.py between the two stages).
    """
    return _run(
        recipe="eve7b_stage2_1_ld",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.1", trainable=("patch_embedding", "vision")),
        data=_data(shards="datacomp1b-30m", template="plain", image_edge=800, max_text_tokens=2048),
        batch_size=1024,
        micro_batch=4,
        learning_rate=1e-4,
        weights="runs/eve7b_stage1",
        copy_text_to_vision=True,
    )


def eve7b_stage2_1_hd() -> RunConfig:
    """Stage 2.1, high definition: the same weights train on 48M images of LAION, OpenImages, SAM and DataComp-1B at
    1600^2 pixels.

    Learning rate 1e-4 as in Table 5; the official script 1.1 and README use 5e-5 (`optim.peak_lr=5e-5
    optim.patch_embedding_lr=5e-5`). About 46.9k steps.
    """
    return _run(
        recipe="eve7b_stage2_1_hd",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.1", trainable=("patch_embedding", "vision")),
        data=_data(
            shards="laion-openimages-sam-datacomp1b-48m",
            template="plain",
            image_edge=1600,
            max_text_tokens=4096,
        ),
        batch_size=1024,
        micro_batch=2,
        learning_rate=1e-4,
        weights="runs/eve7b_stage2_1_ld",
    )


def eve7b_stage2_2() -> RunConfig:
    """Stage 2.2: all weights, 15M questions and answers of Infinity-MM (5M in the paper's appendix, Tables 3 and 4).

    Script 2_..._fullalign_anyratio_hd.sh, about 29.3k steps.
    """
    return _run(
        recipe="eve7b_stage2_2",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="2.2", trainable=("patch_embedding", "vision", "text")),
        data=_data(
            shards="infinity-mm-generalqa", template="qwen2", image_edge=1600, max_text_tokens=4096
        ),
        batch_size=512,
        micro_batch=2,
        learning_rate=2e-5,
        weights="runs/eve7b_stage2_1_hd",
    )


def eve7b_stage3() -> RunConfig:
    """Stage 3: supervised fine-tuning of all weights, 7.3M samples of Infinity-MM and LLaVA-OneVision.

    Script 3_..._finetune_anyratio_hd.sh, about 14.3k steps. The script groups each batch by modality and pairs long
    texts with short ones, so that its GPUs finish together; packs are planned to cost alike, so samples are only
    shuffled. So the two samples of a micro-batch are any two, where the script's are a long and a short one, of which
    the short one weighs less (docs/numerics.md).
    """
    return _run(
        recipe="eve7b_stage3",
        split=VARIANTS["eve-v2.0"],
        stage=StageConfig(name="3", trainable=("patch_embedding", "vision", "text")),
        data=_data(
            shards="infinity-mm-llava-ov", template="qwen2", image_edge=1600, max_text_tokens=5000
        ),
        batch_size=512,
        micro_batch=2,
        learning_rate=1e-5,
        weights="runs/eve7b_stage2_2",
    )


def _data(
    *, shards: str, template: TemplateName, image_edge: int, max_text_tokens: int
) -> DataConfig:
    return DataConfig(
        sources=(ShardSource(path=f"data/{shards}/shards", proportion=1.0),),
        tokenizer="data/tokenizer-qwen2.5",
        template=template,
        image_edge=image_edge,
        max_aspect_ratio=10.0,
        max_text_tokens=max_text_tokens,
        pack_tokens=8192 if image_edge == 800 else 16384,
        align=128,
        sample_align=1,
        open_bins=64,
        shuffle_block_size=1 << 18,
        num_workers=8,
        prefetch_steps=4,
        seed=42,
    )


def _run(
    *,
    recipe: str,
    split: SplitConfig,
    stage: StageConfig,
    data: DataConfig,
    batch_size: int,
    micro_batch: int,
    learning_rate: float,
    weights: str,
    copy_text_to_vision: bool = False,
) -> RunConfig:
    return RunConfig(
        recipe=recipe,
        run_dir=f"runs/{recipe}",
        model=qwen2_5_7b(split=split),
        stage=stage,
        data=data,
        parallel=ParallelConfig(
            num_nodes=16,
            gpus_per_node=8,
            tensor=4,
            pipeline=1,
            virtual_pipeline=1,
            context=1,
            sequence_parallel=True,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        batch=BatchConfig(unit="samples", size=batch_size),
        optim=OptimConfig(
            peak_lr=learning_rate,
            patch_embedding_lr=learning_rate,
            min_lr=0.0,
            warmup_fraction=0.03,
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_eps=1e-8,
            weight_decay=0.0,
            clip_grad=None,
            loss_normalization="official",
            loss_group_samples=micro_batch,
        ),
        train=TrainConfig(
            steps=None,
            epochs=1.0,
            dtype="bf16",
            backend="te",
            recompute="selective",
            seed=42,
            deterministic=False,
            distributed_timeout_s=1800,
        ),
        checkpoint=CheckpointConfig(
            load_weights_from=weights,
            copy_text_to_vision=copy_text_to_vision,
            save_every_steps=1000,
            keep_last=3,
            keep_every_steps=None,
            async_save=True,
        ),
        logging=LoggingConfig(
            every_steps=1, tensorboard=True, wandb=False, wandb_project="megatron-eve"
        ),
    )
