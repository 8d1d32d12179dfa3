# SPDX-License-Identifier: Apache-2.0
"""config.json and preprocessor_config.json of a Hugging Face folder, both directions.

Read: `model_type` qwen2 or llama (plain language models) or eve-qwen2 (ours and the official release). Every field is
read by its name; what this project's decoder does not compute is refused (config/hf_checks.py), as are files of one
folder that contradict each other. Written: the official EVE fields, plus what makes the folder load by itself
(`auto_map`, the geometry of the patch embedding).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_eve.config.hf_checks import unsupported, with_rope_theta
from megatron_eve.config.hf_fields import HF_FIELDS
from megatron_eve.config.pixels import CLIP_MEAN, CLIP_STD
from megatron_eve.config.schema import ModelConfig, RunConfig, SplitConfig
from megatron_eve.config.variants import moe_part_from_split
from megatron_eve.errors import CheckpointError

from .hf_processor import read_object, with_processor

NO_SPLIT = SplitConfig(norm=False, attention=False, ffn=False)
FULL_SPLIT = SplitConfig(norm=True, attention=True, ffn=True)

OFFICIAL_PATCH_STRIDE, OFFICIAL_DENSE_STRIDE = 16, 2
"""Geometry of official checkpoints, whose config.json does not say it. A file outside the checkpoint does; in folders
that `--layout official` writes, one inside."""

TRANSFORMERS_VERSION = "4.44.2"
"""The official code's, whose form of config.json ours is. Without one, or with one of 4.57.3 to 4.57.6, transformers
4.57 takes every tokenizer of more than 100,000 words for a Mistral one and warns of an incorrect regex pattern."""

_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
"""Defaults of fields that a Llama config.json may leave out (transformers' LlamaConfig); older ones lack rope_theta.
Sizes have no default here: to leave one out is a mistake."""

_REASONS = {
    "eve-llama3": "the official Llama-3 code of EVEv2, which its authors published for reference and does not run",
    "eve": "EVEv1, which has another patch embedding",
}
"""EVE's model types that no converter reads, and what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """The model in config.json."""

    kind: Literal["qwen2", "llama", "eve-qwen2"]
    model: ModelConfig

    @property
    def is_eve(self) -> bool:
        """Whether there is a patch embedding already."""
        return self.kind == "eve-qwen2"

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the checkpoint stores biases of q, k and v. Without them they are zeros: the same function."""
        return self.kind != "llama"


def read_hf_config(folder: Path, *, patch_embed_dim: int) -> HfModel:
    """Read folder/config.json. `patch_embed_dim` is for a plain language model, which has no patch embedding yet."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path} not found; give a Hugging Face folder with config.json and *.safetensors."
        )
    content = read_object(path)
    kind = content.get("model_type")
    if kind not in ("qwen2", "llama", "eve-qwen2"):
        what = f" ({_REASONS[kind]})" if kind in _REASONS else ""
        raise CheckpointError(
            f"{path}: model_type is {kind!r}{what}, expected 'qwen2' (Qwen2, Qwen2.5), 'llama' (Llama-3, Vicuna) or "
            "'eve-qwen2'."
        )
    if kind == "llama":
        content = _completed_llama(content)
    _refuse_unsupported(content, path)
    content = with_rope_theta(content)
    values = {
        field: _read(content, name, kind=python_type, path=path)
        for field, (name, python_type) in HF_FIELDS.items()
    }
    values["head_dim"] = _read_or(content, "head_dim", None, path=path) or _default_head_dim(
        values, path
    )
    is_eve = kind == "eve-qwen2"
    if is_eve:
        content = with_processor(folder, content)
    return HfModel(
        kind=kind,
        model=ModelConfig(
            **values,
            split=_read_split(content, path) if is_eve else NO_SPLIT,
            patch_stride=_read_or(content, "patch_stride", OFFICIAL_PATCH_STRIDE, path=path),
            dense_stride=_read_or(content, "dense_stride", OFFICIAL_DENSE_STRIDE, path=path),
            patch_embed_dim=_read(content, "mm_hidden_size", kind=int, path=path)
            if is_eve
            else patch_embed_dim,
        ),
    )


def model_json(
    model: ModelConfig,
    *,
    dtype: str,
    eos_id: int | list[int],
    pad_id: int,
    image_edge: int,
    run: RunConfig | None,
) -> dict[str, Any]:
    """config.json of a release. `run` is the run that trained it: its stage says what was tuned."""
    content: dict[str, Any] = {
        "architectures": ["EVEQwen2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_eve.EVEQwen2Config",
            "AutoModelForCausalLM": "modeling_eve.EVEQwen2ForCausalLM",
            "AutoModelForImageTextToText": "modeling_eve.EVEQwen2ForCausalLM",  # of its pipeline
        },
        "model_type": "eve-qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": model.num_layers,
        "head_dim": model.head_dim,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
        "mm_vision_tower": f"openai/eve-anyratio-res{image_edge}-patch{model.patch_stride}",
        "mm_hidden_size": model.patch_embed_dim,
        "patch_stride": model.patch_stride,
        "dense_stride": model.dense_stride,
        "add_moe": model.split.any,
        "moe_part": moe_part_from_split(model.split),
    }
    for field, (name, _) in HF_FIELDS.items():
        content[name] = getattr(model, field)
    if run is not None:
        content |= {
            "tune_VE": "patch_embedding" in run.stage.trainable,
            "tune_LLM": "text" in run.stage.trainable,
            "tune_MOE": "vision" in run.stage.trainable,
            "vision_tower_lr": run.optim.patch_embedding_lr,
        }
    return content


def preprocessor_json(
    model: ModelConfig, *, image_edge: int, exif_rotation: bool
) -> dict[str, Any]:
    """Official fields and values, and the entries by which AutoProcessor and AutoImageProcessor find our classes.

    Without `image_processor_type` on purpose: with it, transformers 4.57 warns that a faster class may exist."""
    return {
        "auto_map": {
            "AutoImageProcessor": "processing_eve.EVEImageProcessor",
            "AutoProcessor": "processing_eve.EVEProcessor",
        },
        "processor_class": "EVEProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": False,
        "do_center_crop": False,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
        "resample": 3,
        "max_size": image_edge,
        "patch_stride": model.patch_stride,
        "dense_stride": model.dense_stride,
        "resize_rule": "train",
        "exif_rotation": exif_rotation,
    }


def _read(content: dict[str, Any], name: str, *, kind: type, path: Path) -> Any:
    if name not in content:
        raise CheckpointError(f"{path}: field {name!r} is missing; add it (a {kind.__name__}).")
    value = content[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a {kind.__name__}.")
    return value


def _read_or(content: dict[str, Any], name: str, default: Any, *, path: Path) -> Any:
    """A whole number, if the file has it."""
    return default if content.get(name) is None else _read(content, name, kind=int, path=path)


def _read_split(content: dict[str, Any], path: Path) -> SplitConfig:
    """The official rule: substrings of moe_part, and nothing is split unless add_moe."""
    if not _read(content, "add_moe", kind=bool, path=path):
        return NO_SPLIT
    part = _read(content, "moe_part", kind=str, path=path)
    split = SplitConfig(norm="layernorm" in part, attention="self_attn" in part, ffn="mlp" in part)
    if not split.any:
        raise CheckpointError(
            f"{path}: add_moe is true, but moe_part is {part!r}; expected any of layernorm, self_attn and mlp "
            "joined by dashes."
        )
    return split


def _completed_llama(content: dict[str, Any]) -> dict[str, Any]:
    """Fills in the fields that a Llama config.json may leave out."""
    given = {name: value for name, value in content.items() if value is not None}
    made = _LLAMA_DEFAULTS | {"num_key_value_heads": content.get("num_attention_heads")}
    if "rope_theta" in with_rope_theta(given):
        del made["rope_theta"]
    return made | given


def _default_head_dim(values: dict[str, Any], path: Path) -> int:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if heads < 1 or hidden % heads:
        raise CheckpointError(
            f"{path}: hidden_size={hidden} is not a multiple of num_attention_heads={heads} and there is no "
            "head_dim; add head_dim."
        )
    head_dim: int = hidden // heads
    return head_dim


def _refuse_unsupported(content: dict[str, Any], path: Path) -> None:
    problems = list(unsupported(content))
    if problems:
        raise CheckpointError("\n".join(f"{path}: {problem}" for problem in problems))
