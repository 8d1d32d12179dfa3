# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json asks for that this decoder does not compute: read by the converters and by inference.

An allow-list. Every field is used (hf_fields.py), must have one value (below), or is known to change nothing when the
model computes logits. Any other field that is set (not null, false, 0 or empty) may scale, window or bias something
that we would not, so it is refused by name: such a model loads without a missing tensor and is another function."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_eve.config.hf_fields import HF_EVE_FIELDS, HF_FIELDS

_SWITCHES: dict[str, str] = {
    "attention_bias": "biases on the attention's projections, the output's included",
    "mlp_bias": "biases in the FFN",
    "use_qk_norm": "norms on queries and keys",
    "qk_norm": "norms on queries and keys",
    "quantization_config": "quantized weights",
    "dual_chunk_attention_config": "attention in chunks",
    "use_mrope": "rotary positions in three dimensions",
}
"""Fields that must be false or absent, and what they would switch on."""

_NEUTRAL: dict[str, float] = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "residual_multiplier": 1.0,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
}
"""Factors that may be 1: then they change nothing."""

_ARCHITECTURES = {
    "qwen2": {"Qwen2ForCausalLM"},
    "llama": {"LlamaForCausalLM", "LLaMAForCausalLM"},
    "eve-qwen2": {"EVEQwen2ForCausalLM"},
}

_ROPE_FIELDS = ("rope_scaling", "rope_parameters")
_ROPE_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}

_INERT = {
    # what the file is, and how transformers handles it
    *("model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "tokenizer_class"),
    *("return_dict", "return_dict_in_generate", "output_scores", "torchscript", "use_bfloat16", "pruned_heads"),
    *("chunk_size_feed_forward", "problem_type", "finetuning_task", "task_specific_params", "id2label", "label2id"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
    *("transformers.js_config", "unsloth_fixed", "unsloth_version", "is_llama_config", "max_sequence_length"),
    # of generation: a release gets a generation_config.json of its own
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "diversity_penalty", "prefix"),
    *("num_return_sequences", "max_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
    # of training alone
    *("attention_dropout", "hidden_dropout", "resid_dropout", "vision_tower_lr"),
    # checked below, or without effect while that holds
    *("hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "rope_scaling"),
    *("rope_parameters", "head_dim", "add_moe", "moe_part"),
}  # fmt: skip
_INERT_PREFIXES = ("_", "mm_", "tune_", "image_", "tokenizer_", "freeze_")
"""Notes of transformers itself, and of the official EVE training."""


def unsupported(content: Mapping[str, Any]) -> Iterator[str]:
    """One message a field: its name, its value, and what this decoder has instead. `content`: of the file."""
    kind = str(content.get("model_type"))
    if content.get("hidden_act") != "silu":
        yield f"hidden_act is {content.get('hidden_act')!r}, expected 'silu'."
    for name, what in _SWITCHES.items():
        if content.get(name):
            yield f"{name} is {content[name]!r} ({what}); this decoder has none."
    yield from _architecture(content, kind=kind)
    yield from _window(content, kind=kind)
    yield from _rope(content)
    for name, neutral in _NEUTRAL.items():
        if content.get(name) not in (None, neutral):
            yield f"{name} is {content[name]!r}; {_INSTEAD.get(name, 'this decoder scales nothing by it')}."
    numbers = [("rope_theta", theta) for theta in _rope_thetas(content).values()]
    for name, value in (*numbers, ("rms_norm_eps", content.get("rms_norm_eps"))):
        if isinstance(value, int | float) and not 0 < value < math.inf:
            yield f"{name} is {value!r}, expected a positive number."
    yield from _unknown(content, kind=kind)


_INSTEAD = {"partial_rotary_factor": "this decoder rotates whole heads"}


def _architecture(content: Mapping[str, Any], *, kind: str) -> Iterator[str]:
    expected = _ARCHITECTURES.get(kind, set())
    found = content.get("architectures") or []
    if isinstance(found, list) and (other := [name for name in found if name not in expected]):
        yield f"architectures is {found!r}, expected {' or '.join(sorted(expected))}, found {other[0]!r}."
    if content.get("auto_map") and kind != "eve-qwen2":
        yield (
            f"auto_map is {content['auto_map']!r}: the model brings code of its own, which may compute something else; "
            "take it out if the weights are those of a plain model."
        )


def _window(content: Mapping[str, Any], *, kind: str) -> Iterator[str]:
    if content.get("use_sliding_window"):
        yield (
            "use_sliding_window is true; this decoder attends to the whole sequence. Set it to false if "
            "the checkpoint was trained so."
        )
    elif content.get("sliding_window") and kind == "llama":  # Qwen2's is asleep without the switch
        yield f"sliding_window is {content['sliding_window']!r}; this decoder attends to the whole sequence."
    types = content.get("layer_types") or []
    other = [t for t in types if t != "full_attention"] if isinstance(types, list) else [types]
    if other:
        yield f"layer_types holds {other[0]!r}; this decoder has 'full_attention' only."


def with_rope_theta(content: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with rope_theta at the top; transformers 5 writes it into rope_parameters."""
    thetas = [*_rope_thetas(content).values()]
    return {**content, "rope_theta": thetas[0]} if thetas else dict(content)


def _rope_thetas(content: Mapping[str, Any]) -> dict[str, Any]:
    """Where a rotary base stands -> its value."""
    places = {"config.json": content} | {field: content.get(field) for field in _ROPE_FIELDS}
    return {
        name: found["rope_theta"]
        for name, found in places.items()
        if isinstance(found, Mapping) and found.get("rope_theta") is not None
    }


def _rope(content: Mapping[str, Any]) -> Iterator[str]:
    (first, theta), *others = _rope_thetas(content).items() or [("", None)]
    for field, other in others:
        if other != theta:
            inside = "" if first == "config.json" else f" in {first}"
            yield (
                f"rope_theta is {theta!r}{inside} and {other!r} in {field}; keep the one that the checkpoint was "
                "trained with."
            )
    for field in _ROPE_FIELDS:
        scaling = content.get(field) or {}
        if not isinstance(scaling, dict):
            yield f"{field} is {scaling!r}, expected an object or null."
            continue
        types = [scaling[key] for key in ("rope_type", "type") if key in scaling]
        if other := [found for found in types if found != "default"]:
            yield (
                f"{field} has RoPE of type {other[0]!r}, which this decoder does not compute; only the default one (no "
                "scaling) is supported."
            )
            continue
        if scaling.get("partial_rotary_factor") not in (None, 1.0):
            yield (
                f"{field}: partial_rotary_factor is {scaling['partial_rotary_factor']!r}; "
                "this decoder rotates whole heads."
            )
        if extra := sorted(scaling.keys() - _ROPE_KEYS):
            what = "is not that of an unscaled RoPE" if types else "has no type"
            yield (
                f"{field} is {scaling!r}, which {what}: what {extra[0]} does is not known. This decoder computes "
                "unscaled RoPE; set the field to null if the checkpoint was trained so."
            )


def _unknown(content: Mapping[str, Any], *, kind: str) -> Iterator[str]:
    known = {name for name, _ in (HF_FIELDS | HF_EVE_FIELDS).values()}
    known |= _INERT | _SWITCHES.keys() | _NEUTRAL.keys() | {"auto_map"}
    for name in sorted(content.keys() - known):
        if content[name] and not name.startswith(_INERT_PREFIXES):
            yield (
                f"{name} is {content[name]!r}, and what it changes is not known here; take the field out of the file "
                f"if this {kind} model computes the same without it."
            )
