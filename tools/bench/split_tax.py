# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer pays for two sets of weights: forward and backward of the partitioned layer against a dense one
at the same number of tokens, over the share of vision tokens.

The dense layer has the same modules with one set of weights and keeps its rows in sequence order, so it permutes
nothing. With both branches holding the dense layer's weights the two layers' outputs are compared before anything is
timed. The tax is the ratio of times minus one. A profile of both says where it goes, by kind of operation.

    python -m tools.bench.split_tax --out runs/bench
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_eve.command import end_with
from megatron_eve.config.megatron import transformer_config
from megatron_eve.config.schema import SplitConfig
from megatron_eve.model.attention import EveSelfAttention, rotate_half
from megatron_eve.model.layer_specs import backend, layer_spec
from megatron_eve.model.modality import KeptRows, ModalityPackedSeqParams
from megatron_eve.parallel.groups import ParallelState, init_distributed, init_model_parallel
from tools.bench.report import (
    BenchmarkError,
    Seconds,
    add_output_options,
    interleaved_seconds,
    markdown_table,
    median_ratio,
    run_benchmark,
)
from tools.bench.setting import Scale, scaled_config

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
WANTED_TAX = 0.05
"""What we hold ourselves to on a CPU, hidden size 1024, 4,096 tokens."""
SAMPLE_TOKENS = 512
_PROFILED_CALLS = 3
OUTPUT_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "concatenation": ("aten::cat",),
    "permutation": ("aten::index_select",),
    "fill and copy": ("aten::fill_", "aten::zero_", "aten::copy_", "aten::slice_backward"),
}
"""Kind -> beginnings of operator names; everything else is elementwise work."""


class SequenceOrderAttention(EveSelfAttention):
    """The attention of a dense layer: rows are in sequence order already."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        packed_seq_params: ModalityPackedSeqParams,
        kept: KeptRows | None = None,
    ) -> Tensor:
        """[T, 1, h] -> [T, 1, h]."""
        routing = packed_seq_params
        assert kept is None, "all rows are compared"
        assert routing.rope_cos is not None and routing.rope_sin is not None
        mixed, _ = self.linear_qkv(hidden_states)
        query, key, value = self._split_heads(mixed[:, 0])
        query = rotate_half(query, cos=routing.rope_cos, sin=routing.rope_sin)
        key = rotate_half(key, cos=routing.rope_cos, sin=routing.rope_sin)
        context = self._core(query, key, value, routing).flatten(1)
        return self.linear_proj(context.unsqueeze(1))[0]


class LayerPair:
    """A dense and a partitioned layer of one shape that compute the same function."""

    def __init__(self, *, hidden_size: int, dtype: Literal["bf16", "fp32"]) -> None:
        scale = Scale(hidden_size=hidden_size, num_layers=1, token_share=1.0)
        self.config = scaled_config("2.2", scale=scale, dtype=dtype)
        self.state = init_model_parallel(self.config.parallel, seed=self.config.train.seed)
        mcore = transformer_config(self.config.model, parallel=self.config.parallel, dtype=dtype)
        self.dense = self._layer(_dense_spec(), mcore)
        split = layer_spec(self.config.model.split, backend=backend("local"))
        self.partitioned = self._layer(split, mcore)
        weights = self.dense.state_dict()
        for name, param in self.partitioned.named_parameters():
            param.data.copy_(weights[name.replace(".vision.", ".").replace(".text.", ".")])

    def _layer(self, spec: Any, mcore: Any) -> torch.nn.Module:
        # not at the top: megatron_eve must be imported before megatron.core
        from megatron.core.transformer.spec_utils import build_module

        groups = self.state.groups
        layer = build_module(spec, config=mcore, layer_number=1, pg_collection=groups)
        built: torch.nn.Module = layer.to(self.state.device)
        return built


def _dense_spec() -> Any:
    spec = layer_spec(SplitConfig(norm=False, attention=False, ffn=False), backend=backend("local"))
    attention = dataclasses.replace(spec.submodules.self_attention, module=SequenceOrderAttention)
    submodules = dataclasses.replace(spec.submodules, self_attention=attention)
    return dataclasses.replace(spec, submodules=submodules)


def routing_of_fraction(
    fraction: float, *, num_tokens: int, head_dim: int, dtype: torch.dtype, state: ParallelState
) -> ModalityPackedSeqParams:
    """Samples of 512 tokens, each with the image first; the share of vision tokens in steps of 1/32."""
    vision = min(max(round(fraction * 32), 1), 31) * SAMPLE_TOKENS // 32
    place = torch.arange(num_tokens)
    is_vision = place % SAMPLE_TOKENS < vision
    order = torch.cat([place[is_vision], place[~is_vision]])
    to_sequence = torch.empty_like(order)
    to_sequence[order] = place
    angles = torch.outer(
        (place % SAMPLE_TOKENS).float(), 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim)
    )
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    num_vision = int(is_vision.sum())
    return ModalityPackedSeqParams(
        qkv_format="thd",
        num_vision=num_vision,
        num_local_vision=num_vision,
        sequence_lengths=(SAMPLE_TOKENS,) * (num_tokens // SAMPLE_TOKENS),
        to_sequence=to_sequence.to(state.device),
        to_rows=order.to(state.device),
        rope_cos=angles.cos().to(state.device, dtype),
        rope_sin=angles.sin().to(state.device, dtype),
    )


def measure(pair: LayerPair, fraction: float, *, num_tokens: int, rounds: int) -> dict[str, Any]:
    """One share of vision tokens: a row of the result.

    Raises: BenchmarkError if the two layers' outputs differ by more than rounding.
    """
    dtype = next(pair.dense.parameters()).dtype
    routing = routing_of_fraction(
        fraction,
        num_tokens=num_tokens,
        head_dim=pair.config.model.head_dim,
        dtype=dtype,
        state=pair.state,
    )
    width = pair.config.model.hidden_size
    sequence = torch.randn(num_tokens, 1, width, device=pair.state.device, dtype=dtype)
    rows = sequence.index_select(0, routing.to_rows)
    _check_outputs(pair, sequence, rows, routing)
    run = {
        "dense": _forward_backward(pair.dense, sequence, routing),
        "partitioned": _forward_backward(pair.partitioned, rows, routing),
    }
    seconds = interleaved_seconds(run, rounds=rounds, warm_up=1)
    return _row(routing, seconds, num_tokens=num_tokens) | {"profile_ms": _profiles(run)}


def _row(
    routing: ModalityPackedSeqParams, seconds: dict[str, Seconds], *, num_tokens: int
) -> dict[str, Any]:
    split, dense = seconds["partitioned"], seconds["dense"]
    return {
        "vision_fraction": routing.num_vision / num_tokens,
        "tax": round(median_ratio(split.wall, dense.wall) - 1, 4),
        "cpu_tax": round(median_ratio(split.cpu, dense.cpu) - 1, 4),
        "seconds": {name: taken.as_json() for name, taken in seconds.items()},
    }


def _forward_backward(
    layer: torch.nn.Module, hidden: Tensor, routing: ModalityPackedSeqParams
) -> Callable[[int], None]:
    gradient = torch.ones_like(hidden)

    def run(_: int) -> None:
        layer.zero_grad(set_to_none=True)
        out, _none = layer(hidden.detach().requires_grad_(), packed_seq_params=routing)
        torch.autograd.backward(out, gradient)

    return run


def _check_outputs(
    pair: LayerPair, sequence: Tensor, rows: Tensor, routing: ModalityPackedSeqParams
) -> None:
    with torch.no_grad():
        dense = pair.dense(sequence, packed_seq_params=routing)[0]
        split = pair.partitioned(rows, packed_seq_params=routing)[0]
    difference = float((split - dense.index_select(0, routing.to_rows)).abs().max())
    if difference > OUTPUT_TOLERANCE[pair.config.train.dtype]:
        raise BenchmarkError(
            f"outputs of the dense and the partitioned layer differ by {difference}."
        )


def _profiles(run: dict[str, Callable[[int], None]]) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of operation, of each layer: of each kind the least of some calls under the profiler."""
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in run}
    for _ in range(_PROFILED_CALLS):
        for name, call in run.items():
            calls[name].append(_profile(call))
    return {
        name: {kind: min(one[kind] for one in profiles) for kind in profiles[0]}
        for name, profiles in calls.items()
    }


def _profile(call: Callable[[int], None]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(0)
    totals = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            kinds = [kind for kind, names in KINDS.items() if event.key.startswith(names)]
            totals[kinds[0] if kinds else "elementwise"] += event.self_cpu_time_total / 1e3
    return {kind: round(value, 2) for kind, value in totals.items()}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "vision tokens": f"{row['vision_fraction']:.0%}",
                "tax": f"{row['tax']:+.1%}",
                "tax in CPU time": f"{row['cpu_tax']:+.1%}",
                "wanted": f"<= {WANTED_TAX:.0%}",
                **{
                    f"{kind}, ms": f"{row['profile_ms']['dense'][kind]:.0f} -> {split:.0f}"
                    for kind, split in row["profile_ms"]["partitioned"].items()
                },
            }
            for row in rows
        ]
    )


def _measure_fractions(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.tokens < SAMPLE_TOKENS or options.tokens % SAMPLE_TOKENS:
        raise BenchmarkError(
            f"--tokens {options.tokens} is not a multiple of {SAMPLE_TOKENS}, the sample length."
        )
    init_distributed(timeout_s=600)
    pair = LayerPair(hidden_size=options.hidden, dtype=options.dtype)
    return [
        measure(pair, fraction, num_tokens=options.tokens, rounds=options.rounds)
        for fraction in options.fractions
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.split_tax",
        description="Time of a partitioned decoder layer over a dense one, by share of vision tokens.",
        epilog="example: python -m tools.bench.split_tax --out runs/bench",
    )
    add_output_options(parser, name="split_tax")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size (1024)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens, a multiple of 512 (4096)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each, interleaved (7)")
    parser.add_argument("--fractions", nargs="+", type=float, default=list(FRACTIONS))
    parser.add_argument("--dtype", choices=OUTPUT_TOLERANCE, default="fp32")
    options = parser.parse_args(arguments)
    return run_benchmark(
        options, name="split_tax", measure=lambda: _measure_fractions(options), table=_table
    )


if __name__ == "__main__":
    end_with(main)
