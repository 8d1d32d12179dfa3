# SPDX-License-Identifier: Apache-2.0
"""What config.json says and this decoder does not compute is refused by name; published files pass."""

from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from megatron_eve.config.hf_checks import unsupported, with_rope_theta

QWEN25 = {  # Qwen2.5-7B-Instruct
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
SMOLLM2 = {  # SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
VICUNA = {  # vicuna-7b-v1.5
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "max_sequence_length": 4096,
    "model_type": "llama",
    "pad_token_id": 0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}


@pytest.mark.parametrize(
    "content",
    [
        QWEN25,
        SMOLLM2,
        VICUNA,
        Qwen2Config(architectures=["Qwen2ForCausalLM"]).to_dict(),
        LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict(),
        QWEN25 | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        QWEN25 | {"layer_types": ["full_attention"] * 28, "dtype": "bfloat16"},
        QWEN25 | {"rope_scaling": {}},
        QWEN25 | {"rope_scaling": {"rope_type": "default", "type": "default"}},
        QWEN25 | {"something_new": False, "another": None},
    ],
    ids=lambda content: str(content.get("_name_or_path") or content["model_type"]),
)
def test_published_files_pass(content: dict[str, Any]) -> None:
    assert list(unsupported(content)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling is {'factor': 2.0}, which has no type: what factor does"),
        ({"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}}, "rope_parameters is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE of type 'linear'"),
        ({"rope_scaling": {"type": "default", "rope_type": "yarn"}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"type": None, "factor": 2.0}}, "RoPE of type None"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "what mrope_section does"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "what full_attention does"),
        ({"rope_scaling": [2.0]}, "rope_scaling is [2.0], expected an object or null"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_scaling: partial_"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 1000000.0 and 500000.0 in rope_parameters"),
        ({"rope_scaling": {"type": "default", "rope_theta": 5e5}}, "rope_theta is 1000000.0 and 500000.0 in rope_sc"),
        ({"rope_theta": None, "rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5e5}},
         "rope_theta is 10000.0 in rope_scaling and 500000.0 in rope_parameters"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0, expected a pos"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06, expected a positive number"),
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"qk_norm": True}, "qk_norm is True (norms on"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4} (quantized"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config is"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, and what it changes is not known"),
        ({"attention_multiplier": 0.0156}, "attention_multiplier is 0.0156, and what it"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], and what it"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "architectures is ['Qwen2MoeForCausalLM'], expected Qwen2For"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "brings code of its own"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_another_function_is_refused(change: dict[str, Any], message: str) -> None:
    (line,) = unsupported(QWEN25 | change)
    assert message in line


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_the_rotary_base_is_found_wherever_a_file_says_it(field: str) -> None:
    inside = QWEN25 | {"rope_theta": None, field: {"rope_type": "default", "rope_theta": 5e5}}
    assert list(unsupported(inside)) == []
    assert with_rope_theta(inside)["rope_theta"] == 5e5
    assert with_rope_theta(QWEN25) == QWEN25


def test_a_window_without_a_switch_is_awake_in_a_llama() -> None:
    assert list(unsupported(QWEN25)) == []  # 131072, asleep
    (line,) = unsupported(VICUNA | {"sliding_window": 4096})
    assert "sliding_window is 4096" in line
