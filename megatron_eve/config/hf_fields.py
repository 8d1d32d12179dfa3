# SPDX-License-Identifier: Apache-2.0
"""Where a Hugging Face config.json has the fields of ModelConfig: read by the converters and by inference."""

HF_FIELDS: dict[str, tuple[str, type]] = {
    "num_layers": ("num_hidden_layers", int),
    "hidden_size": ("hidden_size", int),
    "ffn_hidden_size": ("intermediate_size", int),
    "num_attention_heads": ("num_attention_heads", int),
    "num_kv_heads": ("num_key_value_heads", int),
    "vocab_size": ("vocab_size", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "rope_theta": ("rope_theta", float),
    "tie_word_embeddings": ("tie_word_embeddings", bool),
    "init_std": ("initializer_range", float),
}
"""Fields of every decoder: ModelConfig's -> name and type in config.json."""

HF_EVE_FIELDS: dict[str, tuple[str, type]] = {
    "patch_embed_dim": ("mm_hidden_size", int),
    "patch_stride": ("patch_stride", int),
    "dense_stride": ("dense_stride", int),
    "head_dim": ("head_dim", int),
}
"""Further fields of our releases; official folders and language models leave some of them out."""
