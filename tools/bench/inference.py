# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and tokens per second of each variant, at the same prompt: the shape of the EVEv2 paper's
Table 6, which compares the decoders that share one patch embedding.

All variants hold the dense model's weights (a vision branch is a copy of the text branch), so that they compute one
function: their logits are compared before anything is timed. First token: indices, patch embedding, prefill, choice.
Then greedy steps, each with the token brought to the host, as a server does. Random weights, 7B's proportions.

    python -m tools.bench.inference --out runs/bench
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_eve import device as devices
from megatron_eve.command import end_with
from megatron_eve.config.schema import ModelConfig
from megatron_eve.config.variants import VARIANTS
from megatron_eve.data.assemble import image_layout
from megatron_eve.inference.cache import KeyValueCache
from megatron_eve.inference.decoder import EveForInference, rotary_table
from megatron_eve.inference.ragged import TEXT, Prompt, ragged
from tools.bench.report import (
    BenchmarkError,
    Seconds,
    add_output_options,
    interleaved_seconds,
    markdown_table,
    median_ratio,
    run_benchmark,
)
from tools.bench.setting import Scale, scaled_model

DENSE = "eve-v1.0"
OUTPUT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest difference of logits, whose size is about 10: two orders of summation, and bfloat16's rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The question to every variant."""

    scale: Scale
    image_edge: int  # patches in a row and in a column of the one image
    text_tokens: int
    new_tokens: int
    batch_size: int
    dtype: torch.dtype
    device: torch.device

    def model(self, variant: str) -> ModelConfig:
        """7B's proportions with the variant's split."""
        return scaled_model(VARIANTS[variant], scale=self.scale)


class Contender:
    """One variant with its cache, ready to answer."""

    def __init__(self, model: EveForInference, prompts: Sequence[Prompt], setting: Setting) -> None:
        self._model, self._prompts, self._setting = model, prompts, setting
        self._lengths = [len(prompt) for prompt in prompts]
        tokens = max(self._lengths) + setting.new_tokens
        self._rotary = rotary_table(model.config, dtype=setting.dtype, device=setting.device)
        self._cache = KeyValueCache.empty(
            model.config, rows=len(prompts), tokens=tokens, dtype=setting.dtype, device=setting.device
        )  # fmt: skip
        self._first: list[int] = []

    @torch.inference_mode()
    def prefill(self) -> Tensor:
        """Logits of the first tokens."""
        batch = ragged(self._prompts, device=self._setting.device)
        pixels = batch.patches.float() / 128 - 1
        rows = range(len(self._prompts))
        return self._model.prefill(batch, pixels, self._rotary, cache=self._cache, rows=rows)

    def first_token(self, _: int) -> None:
        """Prefill and choose."""
        self._first = self.prefill().argmax(-1).tolist()

    @torch.inference_mode()
    def next_tokens(self, _: int) -> None:
        """`new_tokens` greedy steps behind the prefill."""
        tokens, device = self._first, self._setting.device
        for step in range(self._setting.new_tokens):
            positions = [length + step for length in self._lengths]
            logits = self._model.decode(
                torch.tensor(tokens, device=device),
                torch.tensor(positions, device=device),
                self._rotary,
                cache=self._cache,
                longest=max(positions) + 1,
            )
            tokens = logits.argmax(-1).tolist()


def build_contenders(setting: Setting, variants: Sequence[str]) -> dict[str, Contender]:
    """The variants, dense one included. Raises BenchmarkError if they do not compute the same."""
    dense = _random_model(setting)
    weights = dense.state_dict()
    prompts = some_prompts(setting)
    found = {}
    for variant in variants:
        with torch.device("meta"):
            model = EveForInference(setting.model(variant))
        own = {name: weights[name.replace("moe_", "")].clone() for name in model.state_dict()}
        model.load_state_dict(own, assign=True)
        found[variant] = Contender(model.requires_grad_(False), prompts, setting)
    outputs = {name: contender.prefill() for name, contender in found.items()}
    tolerance = OUTPUT_TOLERANCE[str(setting.dtype).removeprefix("torch.")]
    for name, logits in outputs.items():
        difference = float((logits - outputs[variants[0]]).abs().max())
        if not difference <= tolerance:
            raise BenchmarkError(f"logits of {name} and {variants[0]} differ by {difference}.")
    return found


def _random_model(setting: Setting) -> EveForInference:
    with torch.device("meta"):
        model = EveForInference(setting.model(DENSE))
    model = model.to_empty(device=setting.device).to(setting.dtype)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False)


def some_prompts(setting: Setting) -> list[Prompt]:
    """`batch_size` prompts: text, an image, text."""
    model, edge = setting.model(DENSE), setting.image_edge
    layout = image_layout(rows=edge, cols=edge)
    before = setting.text_tokens // 2
    after = setting.text_tokens - before
    kinds = np.concatenate([np.full(before, TEXT), layout, np.full(after, TEXT)]).astype(np.uint8)
    shape = (edge * edge, model.dense_stride**2, 3 * model.patch_stride**2)
    prompts = []
    for number in range(setting.batch_size):
        random = np.random.default_rng(number)
        ids = random.integers(0, model.vocab_size, kinds.size)
        prompts.append(Prompt(ids, kinds, random.integers(0, 256, shape, dtype=np.uint8)))
    return prompts


def measure(setting: Setting, variants: Sequence[str], *, rounds: int) -> list[dict[str, Any]]:
    """One row for each variant; the others are compared with the first."""
    contenders = build_contenders(setting, variants)

    def times(method: Callable[[Contender], Callable[[int], None]]) -> dict[str, Seconds]:
        runs = {name: method(contender) for name, contender in contenders.items()}
        return interleaved_seconds(runs, rounds=rounds, warm_up=1)

    first = times(lambda contender: contender.first_token)
    following = times(lambda contender: contender.next_tokens)
    return [_row(name, setting, first, following, base=variants[0]) for name in variants]


def _row(
    name: str,
    setting: Setting,
    first: Mapping[str, Seconds],
    following: Mapping[str, Seconds],
    *,
    base: str,
) -> dict[str, Any]:
    with torch.device("meta"):
        model = EveForInference(setting.model(name))
    written = setting.new_tokens * setting.batch_size
    return {
        "variant": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prompt_tokens": len(some_prompts(setting)[0]),
        "first_token_ms": round(statistics.median(first[name].wall) * 1e3, 2),
        "first_token_ratio": round(median_ratio(first[name].wall, first[base].wall), 4),
        "tokens_per_s": round(written / statistics.median(following[name].wall), 2),
        "tokens_per_s_ratio": round(median_ratio(following[base].wall, following[name].wall), 4),
        "seconds": {
            "first_token": first[name].as_json(),
            "next_tokens": following[name].as_json(),
        },
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "variant": row["variant"],
                "parameters": f"{row['parameters']:,}",
                "prompt tokens": row["prompt_tokens"],
                "first token, ms": f"{row['first_token_ms']:.0f} ({row['first_token_ratio']:.2f}x)",
                "tokens per second": f"{row['tokens_per_s']:.1f} ({row['tokens_per_s_ratio']:.2f}x)",
            }
            for row in rows
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.inference",
        description="Time to the first token and tokens per second of each variant.",
        epilog="example: python -m tools.bench.inference --out runs/bench",
    )
    add_output_options(parser, name="inference")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (1024; 7B: 3584)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (8; 7B: 28)")
    parser.add_argument(
        "--image-edge", type=int, default=25, help="tokens of the image's edge (25)"
    )
    parser.add_argument("--text-tokens", type=int, default=64, help="tokens of text (64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to write (32)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time (1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--dtype", choices=OUTPUT_TOLERANCE, help="bfloat16 on a GPU, else float32")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if devices.has_gpu() else "float32")
    setting = Setting(
        scale=Scale(hidden_size=options.hidden, num_layers=options.layers, token_share=1.0),
        image_edge=options.image_edge,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        batch_size=options.batch_size,
        dtype=getattr(torch, options.dtype),
        device=devices.local_device(0),
    )
    return run_benchmark(
        options,
        name="inference",
        measure=lambda: measure(setting, options.variants, rounds=options.rounds),
        table=_table,
    )


if __name__ == "__main__":
    end_with(main)
