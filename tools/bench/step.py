# SPDX-License-Identifier: Apache-2.0
"""Useful tokens per second of a whole training step, ours against the official form, in every stage of the curriculum.

Both take the same weights, samples and optimizer. Ours gets packs, the official form its script's micro-batches
(`setting.OFFICIAL`: size, and in stage 3 the grouping by length), padded to their longest sample. Timed: from host
memory (packs, or padded and normalised batches) to updated weights. Useful tokens are those of samples; padding counts
for neither. A result is refused if the two losses of the first step differ by more than rounding.

In that first step, which is not timed, the FLOPs of both are counted: their ratio stands beside the ratio of times.
A model of few layers flatters us: of its last layer, a larger part of it, we compute hardly more than the text rows. So
a second table has the FLOPs of both at 7B's own size, by the formulas whose equality with the counter is tested.

    python -m tools.bench.step --out runs/bench
"""

import argparse
import dataclasses
import itertools
import resource
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_eve import device
from megatron_eve.command import end_with
from megatron_eve.config.recipes import RECIPES
from megatron_eve.config.schema import RunConfig
from megatron_eve.data.sample import Pack
from megatron_eve.metrics.flops import executed_flops, ideal_flops
from megatron_eve.parallel.groups import ParallelState, init_distributed, init_model_parallel
from tools.bench.contenders import OfficialStep, OurStep
from tools.bench.counting import executed_flops_of
from tools.bench.official_form import PaddedBatch, official_flops, padded_batch
from tools.bench.report import (
    BenchmarkError,
    Seconds,
    add_output_options,
    interleaved_seconds,
    markdown_table,
    median_ratio,
    run_benchmark,
)
from tools.bench.samples import StepSamples, as_pack, steps_of_packs, stream
from tools.bench.setting import CURRICULUM, OFFICIAL, Scale, one_process, scaled_config

LOSS_RTOL = {"fp32": 1e-5, "bf16": 2e-2}
"""How far the first losses may be apart: rounding over some thousand targets."""
WANTED_RATIO = {"1": 1.8} | dict.fromkeys(("2.1-ld", "2.1-hd", "2.2", "3"), 2.2)
"""What we hold ourselves to on a CPU."""
FULL_SIZE_TOKENS = 16384
"""Of our packs in each of the steps whose FLOPs are added up at 7B's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step's samples in both forms."""

    packs: list[Pack]
    padded: list[PaddedBatch]

    @property
    def useful_tokens(self) -> int:
        return sum(pack.num_real_vision + pack.num_real_text for pack in self.packs)

    @property
    def padded_tokens(self) -> int:
        return sum(batch.ids.numel() for batch in self.padded)

    @property
    def num_targets(self) -> int:
        return sum(int(pack.label_targets.numel()) for pack in self.packs)


def step_inputs(
    samples: StepSamples, *, config: RunConfig, micro_batch: int, device: torch.device
) -> StepInputs:
    """Both forms of these samples; `micro_batch` samples share a padded batch."""
    ordered = samples.in_stream_order
    return StepInputs(
        packs=[as_pack(pack, config=config) for pack in samples.packs],
        padded=[
            padded_batch(ordered[i : i + micro_batch], model=config.model, device=device)
            for i in range(0, len(ordered), micro_batch)
        ],
    )


class Pair:
    """The two contenders with equal weights, and their losses step by step."""

    def __init__(
        self, config: RunConfig, *, state: ParallelState, official_recompute: bool = True
    ) -> None:
        self._config = config
        self.ours = OurStep(config, state=state)
        self.official = OfficialStep(
            config, weights_of=self.ours.model, recompute=official_recompute
        )

    def first_step(self, inputs: StepInputs) -> dict[str, Any]:
        """Both take this step; what it cost in FLOPs (None on a GPU: see counting.py) and how far the losses differ.

        Raises: BenchmarkError if they differ by more than rounding.
        """
        losses: dict[str, float] = {}

        def our_step() -> None:
            losses["ours"] = self.ours.step(inputs.packs)

        def official_step() -> None:
            losses["official"] = self.official.step(inputs.padded, num_targets=inputs.num_targets)

        model, stage = self._config.model, self._config.stage
        flops: dict[str, int] | None = None
        if device.has_gpu():
            our_step()
            official_step()
        else:
            flops = {
                "ideal": sum(
                    ideal_flops(pack, model=model, trainable=stage.trainable)
                    for pack in inputs.packs
                ),
                "ours": executed_flops_of(our_step),
                "official": executed_flops_of(official_step),
            }
        difference = abs(losses["ours"] / losses["official"] - 1)
        if difference > LOSS_RTOL[self._config.train.dtype]:
            raise BenchmarkError(
                f"stage {stage.name}: the first losses are {losses['ours']} and {losses['official']}; "
                "the two forms do not compute the same."
            )
        return {
            "first_loss_relative_difference": difference,
            "first_step_padded_fill": round(inputs.useful_tokens / inputs.padded_tokens, 4),
            "first_step_flops": flops,
        }

    def seconds(self, inputs: Sequence[StepInputs], *, warm_up: int) -> dict[str, Seconds]:
        """Of each step but the first `warm_up`, interleaved."""

        def our_step(number: int) -> None:
            self.ours.step(inputs[number].packs)

        def official_step(number: int) -> None:
            one = inputs[number]
            self.official.step(one.padded, num_targets=one.num_targets)

        return interleaved_seconds(
            {"ours": our_step, "official": official_step},
            rounds=len(inputs) - warm_up,
            warm_up=warm_up,
        )


def stage_inputs(
    stage: str,
    config: RunConfig,
    *,
    device: torch.device,
    token_share: float,
    step_tokens: int,
) -> Iterator[StepInputs]:
    """Steps of a stage of CURRICULUM; `step_tokens`: of a step's packs, which are whole and at least one."""
    official = OFFICIAL[stage]
    samples = stream(config, token_share=token_share, seed=config.data.seed, official=official)
    steps = steps_of_packs(
        config,
        samples,
        packs_per_step=max(1, step_tokens // config.data.pack_tokens),
        micro_batch=official.micro_batch,
    )
    return (
        step_inputs(one, config=config, micro_batch=official.micro_batch, device=device)
        for one in steps
    )


def flops_at_full_size(stage: str, *, steps: int, official_recompute: bool) -> dict[str, int]:
    """Of some steps of the recipe itself on one process; nothing is computed. The images are drawn with fewer pixels a
    token, and the same tokens."""
    config = dataclasses.replace(RECIPES[CURRICULUM[stage]](), parallel=one_process())
    drawn = dataclasses.replace(config, model=dataclasses.replace(config.model, patch_stride=1))
    inputs = stage_inputs(
        stage, drawn, device=torch.device("cpu"), token_share=1.0, step_tokens=FULL_SIZE_TOKENS
    )
    model, trainable = config.model, config.stage.trainable
    flops = {"ideal": 0, "ours": 0, "official": 0}
    for one in itertools.islice(inputs, steps):
        for pack in one.packs:
            flops["ideal"] += ideal_flops(pack, model=model, trainable=trainable)
            flops["ours"] += executed_flops(pack, config=config)
        for batch in one.padded:
            flops["official"] += official_flops(
                batch, model=model, trainable=trainable, recompute=official_recompute
            )
    return flops


def _measure_stage(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the result."""
    scale = Scale(
        hidden_size=options.hidden, num_layers=options.layers, token_share=options.token_share
    )
    config = scaled_config(stage, scale=scale, dtype=options.dtype)
    state = init_model_parallel(config.parallel, seed=config.train.seed)
    steps = stage_inputs(
        stage,
        config,
        device=state.device,
        token_share=options.token_share,
        step_tokens=options.step_tokens,
    )
    first, *inputs = itertools.islice(steps, 1 + options.warm_up + options.rounds)
    pair = Pair(config, state=state, official_recompute=not options.official_without_recompute)
    row = _setting(stage, config) | pair.first_step(first)
    row["full_size_flops"] = flops_at_full_size(
        stage,
        steps=options.full_size_steps,
        official_recompute=not options.official_without_recompute,
    )
    row |= _work(inputs[options.warm_up :])
    return row | _speed(
        row["useful_tokens_per_step"], seconds=pair.seconds(inputs, warm_up=options.warm_up)
    )


def _setting(stage: str, config: RunConfig) -> dict[str, Any]:
    official = OFFICIAL[stage]
    return {
        "stage": stage,
        "recipe": config.recipe,
        "wanted_ratio": WANTED_RATIO[stage],
        "our_recompute": config.train.recompute,
        "pack_tokens": config.data.pack_tokens,
        "official_script": official.script,
        "official_micro_batch": official.micro_batch,
        "official_grouped_by_length": official.grouped_by_length,
    }


def _work(inputs: Sequence[StepInputs]) -> dict[str, Any]:
    """What the timed steps hold."""
    useful = [one.useful_tokens for one in inputs]
    packed = sum(pack.num_tokens for one in inputs for pack in one.packs)
    vision = sum(pack.num_real_vision for one in inputs for pack in one.packs)
    return {
        "samples": sum(int(batch.lengths.numel()) for one in inputs for batch in one.padded),
        "useful_tokens_per_step": useful,
        "vision_fraction": round(vision / sum(useful), 4),
        "pack_fill": round(sum(useful) / packed, 4),
        "padded_fill": round(sum(useful) / sum(one.padded_tokens for one in inputs), 4),
    }


def _speed(useful: Sequence[int], *, seconds: dict[str, Seconds]) -> dict[str, Any]:
    speed = {
        name: statistics.median(n / s for n, s in zip(useful, taken.wall, strict=True))
        for name, taken in seconds.items()
    }
    return {
        "seconds": {name: taken.as_json() for name, taken in seconds.items()},
        "useful_tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(median_ratio(seconds["official"].wall, seconds["ours"].wall), 3),
        "cpu_ratio": round(median_ratio(seconds["official"].cpu, seconds["ours"].cpu), 3),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,  # so far
    }


def _range_of_ratios(row: dict[str, Any]) -> str:
    wall = {name: taken["wall"] for name, taken in row["seconds"].items()}
    ratios = [b / a for a, b in zip(wall["ours"], wall["official"], strict=True)]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _flop_ratios(flops: dict[str, int] | None) -> tuple[str, str, str]:
    """Ours / ideal, official / ideal, official / ours."""
    if flops is None:
        return ("not counted",) * 3
    pairs = (("ours", "ideal"), ("official", "ideal"), ("official", "ours"))
    ours, official, ratio = (f"{flops[above] / flops[below]:.2f}" for above, below in pairs)
    return ours, official, ratio


def _table(rows: Sequence[dict[str, Any]]) -> str:
    times = [
        {
            "stage": row["stage"],
            "official micro-batch": f"{row['official_micro_batch']}"
            + (", by length" if row["official_grouped_by_length"] else ""),
            "vision tokens": f"{row['vision_fraction']:.0%}",
            "pack fill": f"{row['pack_fill']:.1%}",
            "fill of padded batches": f"{row['padded_fill']:.1%}",
            "ours, useful tokens/s": f"{row['useful_tokens_per_s']['ours']:,.0f}",
            "official form": f"{row['useful_tokens_per_s']['official']:,.0f}",
            "ratio": f"{row['ratio']:.2f}",
            "of the rounds": _range_of_ratios(row),
            "ratio of CPU time": f"{row['cpu_ratio']:.2f}",
            "wanted": f">= {row['wanted_ratio']}",
            "ratio of FLOPs": _flop_ratios(row["first_step_flops"])[2],
        }
        for row in rows
    ]
    columns = ("ours / ideal", "official / ideal", "official / ours")
    flops = [
        {"stage": row["stage"]}
        | {
            f"{name}, {size}": ratio
            for size, key in (("counted here", "first_step_flops"), ("7B", "full_size_flops"))
            for name, ratio in zip(columns, _flop_ratios(row[key]), strict=True)
        }
        for row in rows
    ]
    return f"{markdown_table(times)}\n\nExecuted FLOPs:\n\n{markdown_table(flops)}"


def _measure_stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    init_distributed(timeout_s=600)
    rows = []
    for stage in options.stages:
        rows.append(_measure_stage(stage, options))
        print(f"stage {stage}: ratio {rows[-1]['ratio']}", file=sys.stderr, flush=True)
    return rows


def command_line() -> argparse.ArgumentParser:
    """The options; by default every stage is measured."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.step",
        description="Useful tokens per second of a training step, ours and the official form's.",
        epilog="example: python -m tools.bench.step --out runs/bench",
    )
    add_output_options(parser, name="step")
    parser.add_argument("--stages", nargs="+", choices=CURRICULUM, default=list(CURRICULUM))
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (512)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    parser.add_argument(
        "--token-share", type=float, default=0.25, help="share of the 7B recipe's tokens (0.25)"
    )
    parser.add_argument(
        "--step-tokens", type=int, default=4096, help="tokens of a step's packs (4096)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each (9)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each before them (2)")
    parser.add_argument(
        "--full-size-steps",
        type=int,
        default=16,
        help="steps of which 7B's FLOPs are added up (16)",
    )
    parser.add_argument("--dtype", choices=LOSS_RTOL, default="fp32")
    parser.add_argument(
        "--official-without-recompute", action="store_true", help="to tell the causes apart"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    options = command_line().parse_args(arguments)
    return run_benchmark(
        options, name="step", measure=lambda: _measure_stages(options), table=_table
    )


if __name__ == "__main__":
    end_with(main)
