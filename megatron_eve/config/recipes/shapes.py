# SPDX-License-Identifier: Apache-2.0
"""The decoders that recipes share, one function each; a recipe chooses only the split.

Sources: config.json of Qwen2.5-7B-Instruct; the GGUF metadata of SmolLM2-135M-Instruct, whose Llama decoder is a
Qwen2 decoder with zero QKV bias; EVEv2 vision_tokenizer.py:20-26 for the patch embedding (strides 16 and 2, 1024
channels)."""

from megatron_eve.config.schema import ModelConfig, SplitConfig


def qwen2_5_7b(*, split: SplitConfig) -> ModelConfig:
    """Qwen2.5-7B-Instruct: 7.6 B parameters dense, 14.2 B split as EVEv2."""
    return ModelConfig(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        init_std=0.02,
        split=split,
        patch_stride=16,
        dense_stride=2,
        patch_embed_dim=1024,
    )


def qwen2_5_tiny(*, split: SplitConfig) -> ModelConfig:
    """A Qwen2.5-shaped decoder small enough to learn on two CPU cores: untied, 0.9 M parameters dense."""
    return ModelConfig(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_word_embeddings=False,
        init_std=0.02,
        split=split,
        patch_stride=8,
        dense_stride=2,
        patch_embed_dim=128,
    )


def smollm2_135m(*, split: SplitConfig) -> ModelConfig:
    """SmolLM2-135M-Instruct with its own vocabulary and tied embeddings."""
    return ModelConfig(
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        init_std=0.02,
        split=split,
        patch_stride=16,
        dense_stride=2,
        patch_embed_dim=256,
    )
