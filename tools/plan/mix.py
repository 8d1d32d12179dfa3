# SPDX-License-Identifier: Apache-2.0
"""What an average pack holds: the sizes from which memory, work and time follow.

All samples of a mix are alike, so a pack holds `fill * pack_tokens / (vision + text)` of them, not a whole number.
Averages of the 7B data are assumptions, because the data were not at hand; `--mix` replaces them, and a run's
metrics.jsonl gives those of a run."""

from dataclasses import dataclass

from megatron_eve.config.schema import RunConfig
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.flops import Work

_FILL = 0.99  # what the packer reaches (docs/data.md)
_ANSWER_SHARE = {"plain": 1.0, "qwen2": 0.5}  # of the text that carries labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """An average sample, in tokens, and how full packs are."""

    vision: float
    text: float
    labels: float
    fill: float

    @property
    def tokens(self) -> float:
        return self.vision + self.text


def assumed_mix(config: RunConfig) -> Mix:
    """By image area and template: 480 + 150 tokens at 800^2 pixels, 1,700 + 200, 400 or 500 at 1600^2 in stages 2.1,
    2.2 and 3; smaller recipes the same shares of their own largest image and text."""
    data, stage = config.data, config.stage.name
    if stage == "text":
        return Mix(vision=0, text=150, labels=150, fill=_FILL)
    vision, text = 480.0, 150.0
    if data.image_edge > 800:
        vision, text = 1700.0, {"2.1": 200.0, "2.2": 400.0}.get(stage, 500.0)
    if data.image_edge < 800:
        vision *= (data.image_edge / 800) ** 2
        text = min(text, data.max_text_tokens / 4)
    return Mix(vision=vision, text=text, labels=text * _ANSWER_SHARE[data.template], fill=_FILL)


def parse_mix(text: str) -> Mix:
    """`1700+400` or `1700+400/200`: vision + text / labelled tokens of a sample; without the last all text.

    Raises: ConfigError for anything else."""
    sizes, _, labels = text.partition("/")
    vision, _, words = sizes.partition("+")
    try:
        mix = Mix(
            vision=float(vision),
            text=float(words),
            labels=float(labels) if labels else float(words),
            fill=_FILL,
        )
    except ValueError:
        mix = Mix(vision=-1, text=0, labels=0, fill=0)
    if not (mix.vision >= 0 and mix.text > 0 and 0 < mix.labels <= mix.text):
        raise ConfigError(
            f"--mix {text} is not VISION+TEXT or VISION+TEXT/LABELS, e.g. 1700+400/200."
        )
    return mix


def samples_per_pack(config: RunConfig, mix: Mix) -> float:
    """Samples in a pack, on average."""
    return mix.fill * config.data.pack_tokens / mix.tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class PackRows:
    """Rows of an average pack over all ranks of one replica, padding included."""

    vision: int
    text: int
    kept_vision: int  # of them, those with which the last layer goes on behind its attention
    kept_text: int
    labels: int  # rows of the output layer
    patches: int
    samples: float
    pairs: int  # under the causal masks, padding left out

    @property
    def all(self) -> int:
        return self.vision + self.text


def pack_rows(config: RunConfig, mix: Mix) -> PackRows:
    """Both segments are multiples of `align` and at least one of it, as the packer makes them."""
    data, cp = config.data, config.parallel.context
    rows = data.pack_tokens if cp == 1 else data.pack_tokens + cp * data.align
    samples = samples_per_pack(config, mix)
    vision = round(samples * mix.vision)
    segment = -(-max(vision, 1) // data.align) * data.align
    segment = min(segment, rows - data.align)
    labels = -(-max(round(samples * mix.labels), 1) // data.align) * data.align
    length = mix.tokens
    shards = config.parallel.tensor if config.parallel.sequence_parallel else 1
    block = max(1, data.align // shards) * shards * cp  # one of each modality on every rank
    return PackRows(
        vision=segment,
        text=rows - segment,
        kept_vision=block,
        kept_text=-(-labels // block) * block,
        labels=min(labels, rows - data.align),
        patches=vision,
        samples=samples,
        pairs=round(samples * length * (length + 1) / 2),
    )


def needed_work_of(config: RunConfig, mix: Mix) -> Work:
    """The work of an average pack that its samples need, padding left out (metrics/flops.py: ideal)."""
    samples = samples_per_pack(config, mix)
    vision, text, labels = (
        round(samples * number) for number in (mix.vision, mix.text, mix.labels)
    )
    length = mix.tokens
    # Labels stand at the end of a sample: their queries see all of it but what is behind them.
    label_pairs = mix.labels * (2 * length - mix.labels + 1) / 2
    return Work(
        patches=vision,
        vision=vision,
        text=text,
        pairs=round(samples * length * (length + 1) / 2),
        last_vision=0,
        last_text=labels,
        query_vision=0,
        query_text=labels,
        last_pairs=round(samples * label_pairs),
        labels=labels,
    )
