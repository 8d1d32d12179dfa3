# SPDX-License-Identifier: Apache-2.0
"""Parts `kernels` and `layers` of the GPU benchmark: one decoder layer's forward and backward at the 7B shapes.

`kernels`: the fused permutation and rotary positions against its PyTorch twin, numbers and time. `layers`: the
official form's layer (both branches on all tokens, blended, recomputed) against ours, and what the split costs over a
dense layer at the same tokens, with each of the choices that should lower it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_eve import device
from megatron_eve.config.megatron import DTYPES, PLAIN_GPU, transformer_config
from megatron_eve.config.schema import GpuConfig, SplitConfig
from megatron_eve.model.accelerators import has_module
from megatron_eve.model.layer_specs import backend as backend_named
from megatron_eve.model.layer_specs import layer_spec
from megatron_eve.model.modality import ModalityPackedSeqParams
from megatron_eve.model.te import keep_narrow_linears_in_bf16
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from tools.bench.gpu_setting import (
    NotHere,
    Rows,
    Setting,
    interleaved,
    milliseconds,
    relative_error,
    seconds_of,
)
from tools.bench.official_form import OfficialLayer, TokenContext
from tools.bench.split_tax import SAMPLE_TOKENS, SequenceOrderAttention, routing_of_fraction

VISION_SHARE = 0.625
DENSE = SplitConfig(norm=False, attention=False, ffn=False)
Call = Callable[[], object]


class LayerBench:
    """Layers of one shape on one number of tokens; the dense one keeps its rows in sequence order."""

    def __init__(self, setting: Setting, *, tokens: int) -> None:
        init_distributed(timeout_s=600)
        self.setting, self.tokens, self.model = setting, tokens, setting.layer_model
        self.parallel = setting.config("2.2").parallel
        self.state = init_model_parallel(self.parallel, seed=1)
        self.dtype = DTYPES[setting.dtype]
        self.routing = self._routing()
        x = torch.randn(tokens, 1, self.model.hidden_size, device=self.state.device)
        self.sequence = x.to(self.dtype)
        self.rows = self.sequence.index_select(0, self.routing.to_rows)

    def _routing(self) -> ModalityPackedSeqParams:
        routing = routing_of_fraction(
            VISION_SHARE,
            num_tokens=self.tokens,
            head_dim=self.model.head_dim,
            dtype=self.dtype,
            state=self.state,
        )
        ends = torch.arange(0, self.tokens + 1, SAMPLE_TOKENS, dtype=torch.int32)
        routing.cu_seqlens_q = routing.cu_seqlens_kv = ends.to(self.state.device)
        routing.max_seqlen_q = routing.max_seqlen_kv = SAMPLE_TOKENS
        return routing

    def layer(
        self, *, dense: bool, backend: str | None = None, gpu: GpuConfig = PLAIN_GPU
    ) -> torch.nn.Module:
        """A layer of this backend, freshly initialised."""
        from megatron.core.transformer.spec_utils import build_module

        classes = backend_named(backend or self.setting.backend, gpu=gpu)
        spec = layer_spec(DENSE if dense else self.model.split, backend=classes)
        if dense:
            attention = dataclasses.replace(
                spec.submodules.self_attention, module=SequenceOrderAttention
            )
            submodules = dataclasses.replace(spec.submodules, self_attention=attention)
            spec = dataclasses.replace(spec, submodules=submodules)
        config = transformer_config(
            self.model, parallel=self.parallel, dtype=self.setting.dtype, gpu=gpu
        )
        layer: torch.nn.Module = build_module(
            spec, config=config, layer_number=1, pg_collection=self.state.groups
        )
        layer.to(self.state.device)
        if gpu.fp8 != "none":
            keep_narrow_linears_in_bf16([layer], min_width=gpu.fp8_min_width)
        return layer

    def run(self, layer: torch.nn.Module, x: Tensor) -> Call:
        """Forward and backward; weight gradients are dropped before, as in a step's first micro-batch."""
        from megatron.core.fp8_utils import get_fp8_context

        gradient = torch.ones_like(x)

        def call() -> None:
            layer.zero_grad(set_to_none=True)
            with get_fp8_context(layer.config):
                out, _ = layer(x.detach().requires_grad_(), packed_seq_params=self.routing)
            torch.autograd.backward(out, gradient)

        return call

    def tax(self) -> dict[str, Any]:
        """The split layer under each choice, against the dense one."""
        choices = {"split": PLAIN_GPU, "split, two streams": GpuConfig(modality_streams=True)}
        if device.has_gpu() and has_module("triton"):
            choices["split, fused rope"] = GpuConfig(fused_rope=True)
            choices["split, both"] = GpuConfig(fused_rope=True, modality_streams=True)
        runs = {"dense": self.run(self.layer(dense=True), self.sequence)}
        for name, gpu in choices.items():
            runs[name] = self.run(self.layer(dense=False, gpu=gpu), self.rows)
        return self._compared(runs, base="dense")

    def fp8_tax(self, recipe: str) -> dict[str, Any]:
        """Dense and split layers in FP8, against the split one in BF16."""
        gpu = GpuConfig(fp8=recipe, fp8_min_width=min(2048, self.model.hidden_size))  # type: ignore[arg-type]
        runs = {
            "split, bf16": self.run(self.layer(dense=False), self.rows),
            "dense, fp8": self.run(self.layer(dense=True, gpu=gpu), self.sequence),
            "split, fp8": self.run(self.layer(dense=False, gpu=gpu), self.rows),
        }
        return self._compared(runs, base="split, bf16")

    def _compared(self, runs: dict[str, Call], *, base: str) -> dict[str, Any]:
        seconds = interleaved(runs, rounds=self.setting.rounds)
        return {
            "tokens": self.tokens,
            "vision_tokens": self.routing.num_vision,
            "milliseconds": milliseconds(seconds),
            f"ratio_to_{base}": {n: round(s / seconds[base], 4) for n, s in seconds.items()},
        }

    def blend(self, *, text_frozen: bool) -> dict[str, Any]:
        """The official layer, with the recomputation that it trains with and without, against ours."""
        ours = self.layer(dense=False)
        official = self._official()
        if text_frozen:
            for name, param in ours.named_parameters():
                param.requires_grad_("vision" in name.split("."))
            for name, param in official.named_parameters():
                param.requires_grad_("moe_" in name)
        runs = {
            "ours": self.run(ours, self.rows),
            "official": self._run_official(official, recompute=False),
            "official, recomputed": self._run_official(official, recompute=True),
        }
        return {"text_frozen": text_frozen, **self._compared(runs, base="ours")}

    def _official(self) -> torch.nn.Module:
        with torch.device(self.state.device):
            return OfficialLayer(self.model).to(self.dtype)

    def _run_official(self, layer: torch.nn.Module, *, recompute: bool) -> Call:
        """Samples of one length, so that it pads nothing and its attention needs no mask: its best case."""
        samples = self.tokens // SAMPLE_TOKENS
        x = self.sequence.view(samples, SAMPLE_TOKENS, self.model.hidden_size)
        is_vision = torch.zeros(self.tokens, 1, device=x.device, dtype=self.dtype)
        is_vision[self.routing.to_rows[: self.routing.num_vision]] = 1
        assert self.routing.rope_cos is not None and self.routing.rope_sin is not None
        context = TokenContext(
            vision=is_vision.view(samples, SAMPLE_TOKENS, 1),
            cos=self.routing.rope_cos[:SAMPLE_TOKENS, 0],
            sin=self.routing.rope_sin[:SAMPLE_TOKENS, 0],
            attention_mask=None,
        )
        gradient = torch.ones_like(x)

        def call() -> None:
            layer.zero_grad(set_to_none=True)
            inputs = x.detach().requires_grad_()
            if recompute:
                out = torch.utils.checkpoint.checkpoint(layer, inputs, context, use_reentrant=True)
            else:
                out = layer(inputs, context)
            torch.autograd.backward(out, gradient)

        return call


def layers(setting: Setting, rows: Rows) -> None:
    """Part `layers`."""
    few, many = setting.layer_tokens[0], setting.layer_tokens[-1]

    def attempt(name: str, tokens: int, measure: Callable[[LayerBench], dict[str, Any]]) -> None:
        rows.attempt(
            f"{tokens} tokens: {name}", lambda: measure(LayerBench(setting, tokens=tokens))
        )

    for tokens in setting.layer_tokens:
        attempt("split tax", tokens, LayerBench.tax)
    attempt("official form", few, lambda bench: bench.blend(text_frozen=False))
    attempt("official form, text frozen", few, lambda bench: bench.blend(text_frozen=True))
    for recipe in setting.recipes:
        attempt(f"FP8 {recipe}", many, partial(LayerBench.fp8_tax, recipe=recipe))


def kernels(setting: Setting, rows: Rows) -> None:
    """Part `kernels`."""
    for tokens in setting.layer_tokens:
        rows.attempt(
            f"{tokens} tokens: permutation and rotary positions",
            partial(rope_figures, setting, tokens=tokens),
        )


def rope_figures(setting: Setting, *, tokens: int) -> dict[str, Any]:
    """Errors against the twin in fp64, and milliseconds of forward and backward, fused and as the model does it."""
    if not (device.has_gpu() and has_module("triton")):
        raise NotHere("the Triton kernels run on a GPU only; tests/kernels has them interpreted")
    from megatron_eve.kernels.rope_permute import permute_rope_reference
    from megatron_eve.model.attention import EveSelfAttention
    from megatron_eve.model.fused_rope import FusedRopeSelfAttention

    bench = LayerBench(setting, tokens=tokens)
    fused, unfused = (
        _bare_attention(kind, bench) for kind in (FusedRopeSelfAttention, EveSelfAttention)
    )
    groups = bench.model.num_kv_heads
    per_group = bench.model.num_attention_heads // groups
    width = groups * (per_group + 2) * bench.model.head_dim
    mixed = torch.randn(tokens, width, device=bench.state.device).to(bench.dtype)
    routing = bench.routing

    def twin(x: Tensor) -> tuple[Tensor, ...]:
        assert routing.rope_cos is not None and routing.rope_sin is not None
        return permute_rope_reference(
            x,
            to_sequence=routing.to_sequence,
            cos=routing.rope_cos,
            sin=routing.rope_sin,
            groups=groups,
            per_group=per_group,
        )

    calls = {"fused": lambda x: fused(x, routing), "unfused": lambda x: unfused(x, routing)}
    expected = _with_gradient(twin, mixed.double())
    figures: dict[str, Any] = {"tokens": tokens, "errors": {}, "milliseconds": {}}
    for name, call in calls.items():
        found = _with_gradient(call, mixed)
        figures["errors"][name] = [
            relative_error(a, b) for a, b in zip(found, expected, strict=True)
        ]
        seconds = seconds_of(partial(_with_gradient, call, mixed), rounds=setting.rounds)
        figures["milliseconds"][name] = round(1e3 * seconds, 4)
    figures["bytes_read_and_written_once"] = 4 * mixed.nbytes
    return figures


def _bare_attention(kind: Any, bench: LayerBench) -> Callable[..., tuple[Tensor, ...]]:
    """Only what stands between the projection and the core attention."""
    module: Any = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    module.num_query_groups_per_partition = bench.model.num_kv_heads
    module.num_attention_heads_per_partition = bench.model.num_attention_heads
    module.hidden_size_per_attention_head = bench.model.head_dim
    found: Callable[..., tuple[Tensor, ...]] = module._to_heads
    return found


def _with_gradient(call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = call(x)
    torch.autograd.backward(out, [torch.ones_like(part) for part in out])
    assert x.grad is not None
    return [*(part.detach() for part in out), x.grad]
