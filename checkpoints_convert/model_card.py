# SPDX-License-Identifier: Apache-2.0
"""README.md of a released folder: what the model is, what it was trained on, what was measured, how it is used.

Every number comes from the model's configuration, from the records of its runs (run_record.py) or from a results file
(megatron_eve/evaluation/results.py). The card says what was not recorded; nothing is filled in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_eve.config.schema import ModelConfig, RunConfig
from megatron_eve.config.sizes import parameter_counts
from megatron_eve.config.variants import moe_part_from_split
from megatron_eve.evaluation.results import Figure

from .run_record import History, RunRecord, SourceRecord

_RUN_HEADS = (
    "run", "stage", "trained", "images", "global batch", "loss", "peak lr", "steps", "last logged loss",
)  # fmt: skip
_SOURCE_HEADS = ("run", "data", "samples", "proportion", "template")


@dataclass(frozen=True, kw_only=True, slots=True)
class CardAdditions:
    """What a person adds to the facts of a checkpoint."""

    figures: tuple[Figure, ...] = ()
    license: str | None = None
    versions: tuple[str, ...] = ()  # of the software that wrote the folder


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """The facts of a model card."""

    model: ModelConfig
    dtype: Literal["bfloat16", "float32"]
    image_edge: int
    origin: str  # which checkpoint, which step
    template: str  # of the last stage: how the model is asked
    history: History | None  # None: the checkpoint was not written by a run
    additions: CardAdditions = field(default_factory=CardAdditions)
    not_applied: tuple[str, ...] = ()  # settings of the source's generation_config.json


def last_template(run: RunConfig | None) -> str:
    """How the model is asked: as its last run trained it."""
    return "qwen2" if run is None else run.data.template


def model_card(facts: CardFacts) -> str:
    """The Markdown text."""
    parts = [
        _head(facts),
        _sizes(facts),
        _training(facts.history),
        _figures(facts.additions.figures),
        _USE.format(
            question="" if facts.template == "plain" else "What is in the image?",
            template=facts.template,
        ),
    ]
    if facts.template == "qwen2":
        parts.append(_CHAT)
    parts.append(_END)
    if facts.not_applied:
        parts.append(_NOT_APPLIED.format(settings=", ".join(facts.not_applied)))
    return "\n".join(parts)


def _head(facts: CardFacts) -> str:
    license_line = f"license: {facts.additions.license}\n" if facts.additions.license else ""
    return _HEAD.format(license=license_line)


def _sizes(facts: CardFacts) -> str:
    model = facts.model
    counts = parameter_counts(model)
    rows = [
        ("parameters", f"{sum(counts.values()):,}"),
        ("of the vision branch", f"{counts['vision']:,}"),
        ("of the patch embedding", f"{counts['patch_embedding']:,}"),
        ("separate weights for vision tokens", moe_part_from_split(model.split) or "none (dense)"),
        ("layers x hidden size", f"{model.num_layers} x {model.hidden_size}"),
        ("pixels of a vision token", f"{model.pixels_per_token} x {model.pixels_per_token}"),
        ("image area", f"at most {facts.image_edge} x {facts.image_edge} pixels"),
        ("dtype", facts.dtype),
        ("made from", facts.origin),
        *(
            (("written by", ", ".join(facts.additions.versions)),)
            if facts.additions.versions
            else ()
        ),
    ]
    return _table(("", ""), rows)


def _training(history: History | None) -> str:
    lines = ["## Training", ""]
    if history is None or not history.runs:
        return "\n".join([*lines, "The checkpoint holds no record of a training run.", ""])
    start = f"the weights `{history.start}`" if history.start else "random weights"
    lines += [f"{len(history.runs)} run(s), oldest first, starting from {start}.", ""]
    lines.append(_table(_RUN_HEADS, [_run_row(run) for run in history.runs]))
    rows = [_source_row(run, source) for run in history.runs for source in run.sources]
    return "\n".join([*lines, _table(_SOURCE_HEADS, rows)])


def _run_row(run: RunRecord) -> tuple[str, ...]:
    config = run.config
    edge = config.get("data.image_edge", "?")
    loss = (
        "not recorded"
        if run.last_loss is None
        else f"{run.last_loss:.4f} nats/token at step {run.last_step}"
    )
    return (
        f"{run.name} (`{config.get('recipe', '?')}`)",
        config.get("stage.name", "?"),
        config.get("stage.trainable", "?").replace(",", ", "),
        f"at most {edge}²",
        _batch(config),
        _weighting(config),
        config.get("optim.peak_lr", "?"),
        "not recorded" if run.last_step is None else f"{run.last_step:,}",
        loss,
    )


def _batch(config: Mapping[str, str]) -> str:
    text = f"{config.get('batch.size', '?')} {config.get('batch.unit', '')}".strip()
    is_packs = config.get("batch.unit") == "packs"
    return f"{text} of {config.get('data.pack_tokens', '?')} tokens" if is_packs else text


def _weighting(config: Mapping[str, str]) -> str:
    """Losses of runs that weigh samples differently do not compare."""
    how, size = (
        config.get("optim.loss_normalization", "?"),
        config.get("optim.loss_group_samples", "none"),
    )
    return how if size == "none" else f"{how}, groups of {size} samples"


def _source_row(run: RunRecord, source: SourceRecord) -> tuple[str, ...]:
    number = source.num_samples
    return (
        run.name,
        source.name,
        "not recorded" if number is None else f"{number:,}",
        f"{source.proportion:g}",
        source.template,
    )


def _figures(figures: Sequence[Figure]) -> str:
    lines = ["## Measured", ""]
    if not figures:
        return "\n".join([*lines, "No evaluation was given when this folder was written.", ""])
    rows = [
        (
            figure.task,
            figure.metric,
            f"{figure.value:.4f}",
            "" if figure.num_questions is None else f"{figure.num_questions:,}",
        )
        for figure in figures
    ]
    return "\n".join([*lines, _table(("task", "metric", "value", "questions"), rows)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{license}tags: [eve, encoder-free, vision-language]
---

# EVEv2 vision-language model without a vision encoder

Pixels go through a two-convolution patch embedding straight into the decoder, which has weights of its own for
vision tokens ([EVEv2](https://arxiv.org/abs/2502.06788)). Trained with megatron_eve.
"""

_USE = """## Use

```python
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype="auto")
prompt = processor.prompt("{question}", template="{template}")
inputs = processor(text=prompt, images=Image.open("image.jpg"))
output = model.generate(**inputs, max_new_tokens=32)
print(processor.answers(output, prompt_length=inputs["input_ids"].shape[1])[0])
```
"""

_CHAT = """A conversation, with the images in its first question:

```python
images = [Image.open("image.jpg")]
answer, history = model.chat(processor, "What is in the image?", images=images)
answer, history = model.chat(processor, "Which colour is it?", images=images, history=history)
print(answer)
```
"""

_END = """Decoding is greedy without a repetition penalty. The resize rule is training's (`train`: never enlarges);
`processor(..., resize_rule="eval")` and `model.chat(..., resize_rule="eval")` use the official benchmarks' instead.
Tensor names are those of the official EVEv2 release. The weights descend from the language model that the training
started with; its licence applies to them.
"""

_NOT_APPLIED = """The language model that the training started with decodes otherwise by default ({settings}); this
release does not follow it. Pass such settings to `generate`.
"""
