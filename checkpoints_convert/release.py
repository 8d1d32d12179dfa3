# SPDX-License-Identifier: Apache-2.0
"""A complete Hugging Face folder: weights, configuration, tokenizer, our modelling files, model card.

The folder is written under a temporary name beside its place and renamed when it is whole. Nothing in it points
outside: it loads offline with `AutoModelForCausalLM`, `AutoProcessor` and `AutoTokenizer`, `trust_remote_code=True`.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from checkpoints_convert.hf_config import generation_json, model_json, preprocessor_json
from checkpoints_convert.hf_folder import MAX_SHARD_BYTES, write_safetensors
from checkpoints_convert.names import moe_part
from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.sizes import parameter_counts
from megatron_eve.data.tokenizer import load_tokenizer
from megatron_eve.errors import CheckpointError

CODE_FILES = ("configuration_eve.py", "modality_eve.py", "modeling_eve.py", "processing_eve.py")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What a released folder is made of, apart from the weights."""

    model: ModelConfig
    dtype: Literal["bfloat16", "float32"]
    tokenizer: Path
    image_edge: int  # M of the resize rules (train time)
    run: RunConfig | None  # the run that trained the weights, if the checkpoint knows it
    origin: str  # one line for the model card: which checkpoint, which step


def write_release(
    folder: Path,
    release: Release,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the folder; returns the bytes of the weights. Raises CheckpointError if it exists and not `overwrite`."""
    tokenizer = load_tokenizer(release.tokenizer)
    if tokenizer.vocab_size > release.model.vocab_size:
        raise CheckpointError(
            f"The tokenizer {release.tokenizer} has ids up to {tokenizer.vocab_size - 1}, the model "
            f"{release.model.vocab_size} rows; give the tokenizer that the model was trained with (--tokenizer)."
        )
    partial = claim(folder, overwrite=overwrite)
    total = write_safetensors(partial, tensors, max_shard_bytes=max_shard_bytes)
    files = {
        "config.json": model_json(
            release.model,
            dtype=release.dtype,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            image_edge=release.image_edge,
            run=release.run,
        ),
        "generation_config.json": generation_json(eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id),
        "preprocessor_config.json": preprocessor_json(release.model, image_edge=release.image_edge),
    }
    for name, content in files.items():
        write_json(partial / name, content)
    for name in TOKENIZER_FILES:
        if (release.tokenizer / name).is_file():
            shutil.copyfile(release.tokenizer / name, partial / name)
    code = resources.files("checkpoints_convert.hf")
    for name in CODE_FILES:
        (partial / name).write_text(code.joinpath(name).read_text(encoding="utf-8"))
    (partial / "README.md").write_text(model_card(release))
    publish(partial, folder)
    return total


def claim(folder: Path, *, overwrite: bool) -> Path:
    """A new empty folder beside `folder`, to be renamed to it by `publish`."""
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another name or pass --overwrite.")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place, instead of an older one."""
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """As transformers writes its files: two spaces, sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_card(release: Release) -> str:
    """README.md of the folder."""
    model, run = release.model, release.run
    counts = parameter_counts(model)
    facts = [
        ("parameters", f"{sum(counts.values()):,}"),
        ("of the vision branch", f"{counts['vision']:,}"),
        ("of the patch embedding", f"{counts['patch_embedding']:,}"),
        ("separate weights for vision tokens", moe_part(model.split) or "none (dense)"),
        ("layers x hidden size", f"{model.num_layers} x {model.hidden_size}"),
        ("pixels of a vision token", f"{model.pixels_per_token} x {model.pixels_per_token}"),
        ("image area", f"at most {release.image_edge} x {release.image_edge} pixels"),
        ("dtype", release.dtype),
        ("made from", release.origin),
    ]
    if run is not None:
        facts += [
            ("recipe", run.recipe),
            ("stage", run.stage.name),
            ("trained groups", ", ".join(run.stage.trainable)),
            ("peak learning rate", f"{run.optim.peak_lr:g}"),
            ("global batch", f"{run.batch.size} {run.batch.unit}"),
            ("conversation template", run.data.template),
        ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    template = "qwen2" if run is None else run.data.template
    return _CARD.format(
        table=table, question="" if template == "plain" else _QUESTION, template=template
    )


_QUESTION = "What is in the image?"

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [eve, encoder-free, vision-language]
---

# EVEv2 vision-language model without a vision encoder

Pixels go through a two-convolution patch embedding straight into the decoder, which has weights of its own for
vision tokens ([EVEv2](https://arxiv.org/abs/2502.06788)). Trained with megatron_eve.

| | |
|---|---|
{table}

## Use

```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
prompt = processor.prompt("{question}", template="{template}")
inputs = processor(text=prompt, images=Image.open("image.jpg"))
output = model.generate(**inputs, max_new_tokens=32)
print(processor.answers(output, prompt_length=inputs["input_ids"].shape[1])[0])
```

`processor(..., resize_rule="eval")` uses the official benchmarks' resize rule instead of training's. Tensor names
are those of the official EVEv2 release. The weights descend from the language model that the training started
with; its licence applies to them.
"""
