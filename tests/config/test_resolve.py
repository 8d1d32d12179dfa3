# SPDX-License-Identifier: Apache-2.0
"""Every refusal of resolve(), each reached by overriding a recipe as a user would, and what it must not refuse."""

import re

import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.resolve import resolve
from megatron_eve.errors import ConfigError

S1, S21, S22, TINY = "eve7b_stage1", "eve7b_stage2_1_ld", "eve7b_stage2_2", "eve_tiny_stage2_2"

LAYOUT = [
    (
        S22,
        "parallel.tensor=3",
        "parallel.tensor=3 does not divide model.num_kv_heads=4; use 1, 2 or 4.",
    ),
    (
        S22,
        "parallel.tensor=8",
        "parallel.tensor=8 does not divide model.num_attention_heads=28; use 1, 2 or 4.",
    ),
    (
        TINY,
        "model.ffn_hidden_size=353",
        "parallel.tensor=2 does not divide model.ffn_hidden_size=353; use 1.",
    ),
    (
        S22,
        "parallel.tensor=1",
        "parallel.sequence_parallel=true needs parallel.tensor above 1, found 1",
    ),
    (
        S22,
        "model.num_kv_heads=5",
        "model.num_kv_heads=5 does not divide model.num_attention_heads=28; use 1, 2, 4, 7, 14 "
        "or 28.",
    ),
    (TINY, "model.head_dim=33 model.hidden_size=132", "model.head_dim=33 is odd"),
    (
        S22,
        "parallel.virtual_pipeline=2",
        "parallel.virtual_pipeline=2 needs parallel.pipeline above 1, found 1",
    ),
    (
        S22,
        "parallel.pipeline=8",
        "parallel.pipeline=8 x parallel.virtual_pipeline=1 = 8 does not divide model.num_layers=28",
    ),
    (
        S22,
        "parallel.pipeline=2 parallel.virtual_pipeline=4",
        "= 8 does not divide model.num_layers=28; use a product of 1, 2, 4, 7, 14 or 28.",
    ),
    (
        S22,
        "parallel.context=2",
        "data.sample_align=1 is not a multiple of 4 = 2 x parallel.context=2, but each sample is cut into that many "
        "chunks; use 4, for example.",
    ),
    (
        S22,
        "parallel.context=4 data.sample_align=12",
        "data.sample_align=12 is not a multiple of 8 = 2 x parallel.context=4, but each sample is cut into that many "
        "chunks; use 16, for example.",
    ),
    (
        TINY,
        "parallel.context=2 parallel.gpus_per_node=4 data.sample_align=4 data.align=18 data.pack_tokens=1800",
        "data.align=18 is not a multiple of 4 = 2 x parallel.context=2, but padding is cut over the context ranks like "
        "a sample; use 20, for example.",
    ),
    (
        TINY,
        "parallel.context=2 parallel.gpus_per_node=4 data.sample_align=4 data.pack_tokens=2064",
        "data.pack_tokens=2064 is not a multiple of 32 = parallel.context=2 x data.align=16; use 2080, for example.",
    ),
    (
        S22,
        "parallel.context=3 data.sample_align=6",
        "parallel.tensor=4 x parallel.pipeline=1 x parallel.context=3 = 12 does not divide the 128 processes",
    ),
    (
        S22,
        "parallel.num_nodes=3 parallel.pipeline=7",
        "parallel.tensor=4 x parallel.pipeline=7 = 28 does not divide the 24 processes of "
        "parallel.num_nodes=3 x parallel.gpus_per_node=8",
    ),
    (
        S22,
        "batch.size=31",
        "batch.size=31 samples cannot feed 32 data-parallel ranks; use 32 or more",
    ),
    (
        S22,
        "batch.unit=packs batch.size=33 train.steps=1 train.epochs=none",
        "batch.size=33 packs is not a multiple of the 32 data-parallel ranks; use 64",
    ),
    (
        S22,
        "parallel.pipeline=2 parallel.virtual_pipeline=2",
        "parallel.virtual_pipeline=2 needs batch.unit=packs, found samples",
    ),
    (
        S22,
        "parallel.pipeline=2 parallel.virtual_pipeline=2 batch.unit=packs batch.size=16 "
        "train.steps=1 train.epochs=none",
        "batch.size=16 packs is not a multiple of 32 = 2 pipeline stages x 16 data-parallel ranks",
    ),
    (
        S22,
        "parallel.distributed_optimizer=false",
        "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true",
    ),
    (
        S22,
        "parallel.overlap_grad_reduce=false",
        "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
    ),
]

TRAINING = [
    (S1, "stage.trainable=()", "stage.trainable is empty; stage 1 can train patch_embedding."),
    (S21, "stage.trainable=vision,vision", "stage.trainable=vision,vision names a group twice"),
    (
        S21,
        "model.split=eve-v1.0 checkpoint.copy_text_to_vision=false",
        "the decoder is dense and has no vision branch; set stage.trainable=patch_embedding,text "
        "or model.split=eve-v2.0.",
    ),
    (
        S22,
        "model.split=eve-v1.0",
        "set stage.trainable=patch_embedding,text or model.split=eve-v2.0.",
    ),
    (
        S1,
        "stage.trainable=patch_embedding,text",
        "trains text, which stage.name=1 keeps frozen; use patch_embedding",
    ),
    (
        S21,
        "stage.trainable=patch_embedding,vision,text",
        "trains text, which stage.name=2.1 keeps frozen; use patch_embedding,vision",
    ),
    (
        S22,
        "stage.name=text",
        "trains patch_embedding, which stage.name=text keeps frozen; use text",
    ),
    (S22, "data.image_edge=31", "data.image_edge=31 is below one token's 32 pixels"),
    (
        TINY,
        "data.align=15 data.pack_tokens=510",
        "data.align=15 is not a multiple of parallel.tensor=2; each segment of a pack is cut "
        "over the tensor ranks, so use 16",
    ),
    (
        S22,
        "data.align=32",
        "data.align=32 is not a multiple of 64 = 16 rows x 4 ranks that train.backend=te needs; "
        "use 64",
    ),
    (
        S22,
        "data.pack_tokens=16400",
        "data.pack_tokens=16400 is not a multiple of data.align=128 of at least two blocks (one "
        "of vision, one of text); use 16512",
    ),
    (TINY, "data.pack_tokens=16", "use 32, for example"),
    (
        S22,
        "data.pack_tokens=6784",
        "with data.max_text_tokens=4096 takes 6912, segments aligned to 128; use "
        "data.pack_tokens=6912 or more",
    ),
    (
        S22,
        "data.pack_tokens=65536",
        "data.pack_tokens=65536 is above model.max_position_embeddings=32768",
    ),
    (
        S22,
        "train.steps=10",
        "train.steps=10 and train.epochs=1: exactly one of the two must be set",
    ),
    (S22, "train.epochs=none", "train.steps=none and train.epochs=none: exactly one"),
    (
        S22,
        "optim.min_lr=1e-4",
        "optim.min_lr=0.0001 is above optim.peak_lr=2e-05, so the cosine would rise",
    ),
    (
        S22,
        "optim.min_lr=1e-5 optim.patch_embedding_lr=1e-6",
        "optim.min_lr=1e-05 is above optim.patch_embedding_lr=1e-06",
    ),
    (S22, "train.dtype=fp32", "train.dtype=fp32 needs train.backend=local, found te"),
    (
        S1,
        "checkpoint.copy_text_to_vision=true",
        "checkpoint.copy_text_to_vision=true, but model.split has no component",
    ),
    (
        S21,
        "checkpoint.load_weights_from=none",
        "checkpoint.copy_text_to_vision=true needs checkpoint.load_weights_from, found none",
    ),
    (
        S22,
        "checkpoint.load_weights_from=runs/eve7b_stage2_2/checkpoints",
        "lies in this run's run_dir=runs/eve7b_stage2_2, from which it resumes by itself",
    ),
    (
        S22,
        "checkpoint.keep_every_steps=5000 checkpoint.save_every_steps=2000",
        "checkpoint.keep_every_steps=5000 is not a multiple of checkpoint.save_every_steps=2000; only saved steps can "
        "be kept, so use 6000",
    ),
]

GPU = [
    (TINY, "gpu.fp8=current", "gpu.fp8=current needs train.backend=te, found local"),
    (
        S22,
        "gpu.bf16_first_layers=1",
        "gpu.bf16_first_layers=1 and gpu.bf16_last_layers=0 have no effect with gpu.fp8=none",
    ),
    (
        S22,
        "gpu.fp8=current gpu.fp8_min_width=8192",
        "gpu.fp8=current with gpu.fp8_min_width=8192 leaves every linear in BF16: the widest on a rank of "
        "parallel.tensor=4 has 3584",
    ),
    (
        S22,
        "gpu.fp8=current gpu.fp8_min_width=16 model.ffn_hidden_size=18952",
        "gpu.fp8=current needs widths in multiples of 16, but linear_fc1 has 9476 on a rank of parallel.tensor=4; "
        "raise gpu.fp8_min_width above 3584",
    ),
    (
        S22,
        "gpu.fp8=block gpu.fp8_min_width=3584",
        "data.align=128 is not a multiple of 512 = 128 rows x 4 ranks that gpu.fp8=block needs; use 512",
    ),
    (
        S22,
        "gpu.fp8=delayed gpu.bf16_last_layers=2",
        "gpu.fp8=delayed needs gpu.bf16_first_layers=0 and gpu.bf16_last_layers=0, found 0 and 2",
    ),
    (
        S22,
        "gpu.fp8=current gpu.bf16_first_layers=29",
        "gpu.bf16_first_layers=29 is above the 28 layers of a pipeline stage",
    ),
    (S22, "gpu.bf16_first_layers=-1", "gpu.bf16_first_layers=-1 is negative"),
    (S22, "gpu.fp8_min_width=0", "gpu.fp8_min_width=0 is below 1"),
]
RANGE = [
    (S22, "model.num_layers=0", "model.num_layers=0 is below 1; use 1 or more."),
    (S22, "train.steps=0 train.epochs=none", "train.steps=0 is below 1"),
    (S22, "batch.size=-1", "batch.size=-1 is below 1"),
    (S22, "optim.peak_lr=0", "optim.peak_lr=0.0 is not positive; use a number above 0."),
    (
        S22,
        "optim.clip_grad=0",
        "optim.clip_grad=0.0 is not positive; use a number above 0, or none for no clipping.",
    ),
    (S22, "profile.first_step=0", "profile.first_step=0 is below 1; use 1 or more."),
    (
        S22,
        "profile.first_step=9 profile.last_step=8",
        "profile.last_step=8 is before profile.first_step=9; use the same number to record one step.",
    ),
    (S22, "profile.ranks=0,128", "profile.ranks holds 128; name ranks from 0 to 127, e.g. 0."),
    (S22, "profile.ranks=()", "profile.ranks is empty; name ranks from 0 to 127, e.g. 0."),
    (S22, "optim.weight_decay=-0.1", "optim.weight_decay=-0.1 is negative; use 0 or more."),
    (
        S22,
        "optim.warmup_fraction=1",
        "optim.warmup_fraction=1.0 is not a fraction; use a number from 0 to below 1.",
    ),
    (S22, "run_dir=", "run_dir is empty; give it a value."),
    (
        S22,
        "data.max_aspect_ratio=0.5",
        "data.max_aspect_ratio=0.5 is below 1, the ratio of a square",
    ),
    (S22, "data.sources=()", "data.sources is empty; set data.sources.0.path"),
    (S22, "data.sources.0.path=", "data.sources.0.path is empty; name a folder of MDS shards."),
    (S22, "data.sources.0.proportion=0", "data.sources.0.proportion=0.0 is not positive"),
    (
        S22,
        "data.sources.0.path=a data.sources.1.path=a data.sources.1.proportion=1",
        "data.sources 0 and 1 name the same folder a; keep one",
    ),
]


@pytest.mark.parametrize(("recipe", "overrides", "message"), LAYOUT + TRAINING + GPU + RANGE)
def test_refusal_says_what_and_why(recipe: str, overrides: str, message: str) -> None:
    config = apply_overrides(load_recipe(recipe), overrides.split(" "))
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve(config)


def test_all_problems_are_reported_at_once() -> None:
    config = apply_overrides(load_recipe(S22), ["parallel.tensor=3", "train.steps=5"])
    with pytest.raises(ConfigError) as refusal:
        resolve(config)
    message = str(refusal.value)
    assert "model.num_kv_heads=4" in message
    assert "train.steps=5 and train.epochs=1: exactly one" in message


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        (S22, "parallel.tensor=2 parallel.pipeline=2"),
        (S22, "parallel.context=2 data.sample_align=4"),
        (S22, "parallel.context=1 data.sample_align=3"),
        (S22, "parallel.tensor=1 parallel.sequence_parallel=false"),
        (
            S22,
            "parallel.pipeline=2 parallel.virtual_pipeline=7 batch.unit=packs batch.size=64 "
            "train.steps=9 train.epochs=none",
        ),
        (S22, "model.split=eve-v1.5"),
        (S22, "stage.trainable=vision,text"),
        (
            S21,
            "model.split=eve-v1.0 stage.trainable=patch_embedding,text "
            "checkpoint.copy_text_to_vision=false",
        ),
        (S22, "train.backend=local train.dtype=fp32"),
        (S22, "gpu.fp8=current gpu.bf16_first_layers=1 gpu.bf16_last_layers=1"),
        (S22, "gpu.fp8=delayed gpu.modality_streams=true gpu.fused_weight_gradients=true"),
        (S22, "gpu.fp8=block data.align=512"),
        (TINY, "parallel.tensor=1 parallel.sequence_parallel=false parallel.pipeline=2"),
        (TINY, "model.vocab_size=513"),
        (S22, "checkpoint.load_weights_from=runs/eve7b_stage2_2b"),
    ],
)
def test_possible_runs_pass_unchanged(recipe: str, overrides: str) -> None:
    config = apply_overrides(load_recipe(recipe), overrides.split(" "))
    assert resolve(config) is config
