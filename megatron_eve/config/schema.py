# SPDX-License-Identifier: Apache-2.0
"""What a run is made of, as frozen dataclasses. A recipe (recipes.py) fills every field; nothing edits a
configuration after resolve() (resolve.py) has checked it. Sources: EVEv2 paper (arXiv 2502.06788) Table 5 and the
official scripts for the numbers, megatron-core's TransformerConfig for the meaning of the parallel fields."""

from dataclasses import dataclass
from typing import Literal

TrainableGroup = Literal["patch_embedding", "vision", "text"]
"""The three sets of weights that stages freeze and train.

`patch_embedding`: both convolutions, CLS and SPL. `vision`: every weight of the decoder that belongs to vision tokens
alone. `text`: everything else (text branch or shared decoder, token embedding, final norm, output layer)."""

StageName = Literal["text", "1", "2.1", "2.2", "3"]
TemplateName = Literal["plain", "qwen2"]
LossNormalization = Literal[
    "global_tokens", "sample_mean", "sqrt_tokens", "official", "microbatch_mean"
]
"""How much each sample weighs in a step's loss (training/loss.py). `microbatch_mean`, the mean over packs, is there
only so that the configurations of earlier runs can be read; resolve() refuses it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Which components of a decoder layer have separate weights for vision and text tokens."""

    norm: bool
    attention: bool
    ffn: bool

    @property
    def any(self) -> bool:
        """Whether the decoder has a vision branch at all."""
        return self.norm or self.attention or self.ffn


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Qwen2.5-shaped decoder with EVEv2's patch embedding. Field names follow megatron-core, not HF."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # rows of the token embedding, before padding to the tensor-parallel size
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    init_std: float
    split: SplitConfig
    patch_stride: int  # pixels covered by the first convolution (16)
    dense_stride: int  # patches of the first convolution merged by the second one (2)
    patch_embed_dim: int  # channels between the two convolutions (1024; HF: mm_hidden_size)

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels that becomes one vision token (32)."""
        return self.patch_stride * self.dense_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Which stage of the curriculum this run is, and which groups of weights it trains."""

    name: StageName
    trainable: tuple[TrainableGroup, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSource:
    """One folder of MDS shards made by data_prep, its share of the samples of an epoch, and how its text is written.

    `proportion` weights the sources against each other; the epoch has as many samples as the sources have together.
    With one source it has no effect."""

    path: str
    proportion: float
    template: TemplateName | None = None  # None: data.template


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where samples come from and how they become packs."""

    sources: tuple[ShardSource, ...]
    tokenizer: str  # folder with tokenizer.json (HF format)
    template: TemplateName  # of every source that names none
    image_edge: int
    """M of the official resize rules: the area is capped at M * M pixels (800 or 1600)."""
    max_aspect_ratio: float  # images beyond it are quarantined
    max_text_tokens: int  # a sample is cut to this many tokens, in which each image counts as one
    pack_tokens: int  # T: tokens of one pack (micro-batch), a multiple of `align`
    align: int  # vision and text segments of a pack are padded to multiples of this
    sample_align: int  # every sample is padded with text to a multiple of this: 1, or 2 * parallel.context times any
    open_bins: int  # with batch.unit=packs: the packer chooses from samples for this many packs
    shuffle_block_size: int  # streaming's py1e block, in samples
    num_workers: int  # threads that read and decode ahead of the trainer
    prefetch_steps: int  # steps that may lie ready ahead of the trainer
    seed: int
    max_unreadable: float = 0.01
    """Share of the samples of all sources, rounded up, that may be unreadable (missing or damaged files and rows)
    before the run stops. A share, because what such rows cost is a share of the data; 0: none at all."""
    exif_rotation: bool = True
    """Pictures are turned as their metadata says; the shards' build must have chosen the same. False: as the official
    code, which looks at no metadata."""
    decode_on: Literal["cpu", "gpu"] = "cpu"
    """Where JPEG is decoded. cpu: to the pixels that inference sees, bit by bit; gpu: nvJPEG rounds in its own way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the model and the data are spread over processes. The data-parallel size is what remains."""

    num_nodes: int
    gpus_per_node: int
    """Processes per node; on a machine without GPU the same number of CPU processes."""
    tensor: int
    pipeline: int
    virtual_pipeline: int  # model chunks per pipeline stage; 1 = not interleaved
    context: int  # each sample of a pack is cut over this many ranks, zigzag
    sequence_parallel: bool
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The global batch. `samples`: exactly `size` samples a step, as the paper counts; `packs`: exactly `size` full
    packs a step, so a fixed number of tokens."""

    unit: Literal["samples", "packs"]
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, and the weight of each sample in the loss."""

    peak_lr: float
    patch_embedding_lr: float  # official `vision_tower_lr`
    min_lr: float
    warmup_fraction: float  # of the run's steps
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    weight_decay: float
    clip_grad: float | None  # global norm; None: no clipping, as in the official runs
    loss_normalization: LossNormalization
    loss_group_samples: int | None = None
    """With loss_normalization=official: samples of a micro-batch of the official script. None with every other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length and numerics of the run."""

    steps: int | None  # None: as many as `epochs` over the sources give
    epochs: float | None
    dtype: Literal["bf16", "fp32"]
    backend: Literal["local", "te"]  # local: megatron-core's own layers; te: Transformer Engine
    recompute: Literal["none", "selective", "full"]
    seed: int
    deterministic: bool  # only kernels that give the same bits for the same input
    distributed_timeout_s: int
    on_non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite updates nothing; the run ends there or goes on with the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """What a run may do on a GPU beyond plain BF16. All off: each is a choice, measured by tools/bench/gpu.py.

    The `fp8_*` and `bf16_*` fields and `modality_streams` belong to train.backend=te. No choice depends on a pack's
    contents, because ranks whose products differ in precision would exchange different scales."""

    fp8: Literal["none", "current", "delayed", "block"] = "none"
    """Linears of the decoder in FP8, one scale a tensor, by the step's own maximum (`current`), by those of earlier
    steps (`delayed`), or one scale a block of 128 (`block`). Weights, norms and attention stay BF16."""
    fp8_min_width: int = 2048
    """A linear whose input or output on one rank is narrower than this stays BF16: quantizing would cost what the
    product saves."""
    bf16_first_layers: int = 0  # decoder layers at the start that stay BF16
    bf16_last_layers: int = 0
    modality_streams: bool = False  # vision and text modules of a block on two CUDA streams
    fused_weight_gradients: bool = False
    """Weight gradients are added to the fp32 buffer by the product itself."""
    fused_rope: bool = False  # one Triton kernel for permutation and rotary positions


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints and weights, read and written. A run that finds its own checkpoints resumes from the newest."""

    load_weights_from: str | None
    """Checkpoint folder of another run, stage or converter: weights only."""
    copy_text_to_vision: bool
    """Vision weights that the loaded checkpoint lacks are copies of the text weights."""
    save_every_steps: int
    keep_last: int
    keep_every_steps: int | None
    """Checkpoints at its multiples are kept for good; None: the last ones only."""
    async_save: bool  # train on while a checkpoint is written


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """Where metrics go; console and JSONL are always on."""

    every_steps: int
    tensorboard: bool
    wandb: bool  # offline when wandb itself finds no login, or its server does not answer
    wandb_project: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """Which steps of which ranks are recorded, and by what (docs/profiling.md). Off unless asked for; with defaults,
    so that the configurations of earlier runs can still be read."""

    tool: Literal["none", "nsys", "kineto"] = "none"  # kineto: torch.profiler, on any machine
    first_step: int = 10  # as the log counts them; earlier ones warm up caches and the allocator
    last_step: int = 12  # inclusive
    ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """A command beside the training on published checkpoints (training/evaluation.py); off unless there is one."""

    command: str | None = None  # with {checkpoint}, {step} and {out}, where it writes metrics.json
    every_steps: int | None = None  # checkpoints at its multiples; None: every one
    timeout_s: int = 600  # then it is killed and counted


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: what `python -m megatron_eve.train RECIPE key=value ...` executes."""

    recipe: str
    run_dir: str
    model: ModelConfig
    stage: StageConfig
    data: DataConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optim: OptimConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    gpu: GpuConfig = GpuConfig()
    profile: ProfileConfig = ProfileConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
