# SPDX-License-Identifier: Apache-2.0
"""Part `modules` of the GPU benchmark: each of the backend's modules against fp64, output and every gradient, beside
what PyTorch's own operators in the same dtype are off. Errors are relative, by Frobenius norm."""

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_eve.config.megatron import PLAIN_GPU, transformer_config
from megatron_eve.config.schema import GpuConfig
from megatron_eve.model.layer_specs import backend as backend_named
from megatron_eve.model.modality import ModalityPackedSeqParams
from megatron_eve.model.partitioned import ModalityPartitionedLinear
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from tools.bench.gpu_setting import Rows, Setting, relative_error

Errors = dict[str, float]
_ROWS = {"full": 2048, "tiny": 64}


class ModuleBench:
    """Builds a backend's modules at the shapes of one layer and compares them with fp64."""

    def __init__(self, setting: Setting, *, gpu: GpuConfig = PLAIN_GPU) -> None:
        init_distributed(timeout_s=600)
        self.setting, self.model = setting, setting.layer_model
        parallel = setting.config("2.2").parallel
        self.state = init_model_parallel(parallel, seed=1)
        self.config = transformer_config(
            self.model, parallel=parallel, dtype=setting.dtype, gpu=gpu
        )
        self.classes = backend_named(setting.backend, gpu=gpu)
        self.gpu = gpu
        self.rows = _ROWS[setting.size]

    def context(self) -> Any:
        """megatron-core's own FP8 context for a layer."""
        if self.gpu.fp8 == "none":
            return nullcontext()
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(self.config)

    def column(self, branch: type, *, width: int, name: str, bias: bool) -> torch.nn.Module:
        module: torch.nn.Module = branch(
            self.model.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=self.state.groups.tp,
        )
        return self._with_noise(module)

    def row(self, *, width: int, name: str) -> torch.nn.Module:
        module: torch.nn.Module = self.classes.row_linear(
            width,
            self.model.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name=name,
            tp_group=self.state.groups.tp,
        )
        return self._with_noise(module)

    def norm(self) -> torch.nn.Module:
        size, eps = self.model.hidden_size, self.config.layernorm_epsilon
        module = self.classes.norm(config=self.config, hidden_size=size, eps=eps)
        return self._with_noise(module)

    def _with_noise(self, module: torch.nn.Module) -> torch.nn.Module:
        """On the device, with no bias zero and no norm weight one."""
        module.to(self.state.device)
        generator = torch.Generator(self.state.device).manual_seed(2)
        for param in module.parameters():
            noise = torch.randn(param.shape, generator=generator, device=param.device)
            param.data.add_(noise.to(param.dtype), alpha=0.1 if param.dim() == 1 else 0.01)
        return module

    def tensor(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.state.device).manual_seed(seed)
        wide = torch.randn(shape, generator=generator, device=self.state.device)
        return wide.to(self.config.params_dtype)

    def linear_errors(self, module: torch.nn.Module) -> dict[str, Any]:
        """Of a linear, with or without a norm inside, or a norm alone."""
        weight: Any = module.weight
        x = self.tensor(self.rows, 1, weight.shape[-1], seed=3)
        repeats = 4 if self.gpu.fp8 == "delayed" else 1  # a delayed scale needs a history
        for _ in range(repeats):
            module.zero_grad()
            found = self._run(lambda x: _first(module(x)), x, dict(module.named_parameters()))
        weights = {n: p.detach() for n, p in module.named_parameters()}
        eps = self.config.layernorm_epsilon
        results = {}
        for name, dtype in (("reference", torch.float64), ("torch", x.dtype)):
            copies = {n: w.to(dtype).requires_grad_() for n, w in weights.items()}
            plain = partial(_plain, weights=copies, eps=eps)
            results[name] = self._run(plain, x.to(dtype), copies)
        return {
            "errors": _errors(found, results["reference"]),
            "errors_of_torch": _errors(results["torch"], results["reference"]),
        }

    def _run(
        self, call: Callable[[Tensor], Tensor], x: Tensor, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        low = x.dtype == self.config.params_dtype
        with self.context() if low else nullcontext():
            out = call(x)
        torch.autograd.backward(out, self.tensor(*out.shape, seed=4).to(out.dtype))
        grads = {f"d {name}": weight.grad for name, weight in weights.items()}
        found = {"out": out.detach(), "d input": x.grad} | grads
        return {name: value.detach() for name, value in found.items() if value is not None}

    def partitioned_errors(self) -> dict[str, Any]:
        """Two segments through the partitioned QKV projection, text frozen: no weight gradient there, dx everywhere."""
        branch = self.classes.norm_column_linear or self.classes.column_linear
        width = self.model.hidden_size
        kwargs = dict(
            branch=branch,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=True,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.state.groups.tp,
        )
        module = self._with_noise(ModalityPartitionedLinear(width, 2 * width, **kwargs))
        module.text.requires_grad_(False)
        x = self.tensor(self.rows, 1, width, seed=3)
        split = self.rows // 4 * 3
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        found = self._run(lambda x: module(x, split)[0], x, named)
        copies = {n: p.detach().double() for n, p in module.named_parameters()}
        for name in named:
            copies[name].requires_grad_()
        eps = self.config.layernorm_epsilon

        def plain(x: Tensor) -> Tensor:
            parts = [
                _plain(
                    part,
                    weights={n[len(m) + 1 :]: c for n, c in copies.items() if n.startswith(m)},
                    eps=eps,
                )
                for m, part in (("vision", x[:split]), ("text", x[split:]))
            ]
            return torch.cat(parts)

        expected = self._run(plain, x.double(), {n: copies[n] for n in named})
        frozen = [
            n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None
        ]
        return {"errors": _errors(found, expected), "gradients_of_frozen_weights": frozen}

    def attention_errors(self) -> dict[str, Any]:
        """Packed causal attention over samples of uneven lengths, grouped queries."""
        from megatron.core.transformer.enums import AttnMaskType

        module = self.classes.core_attention(
            config=self.config,
            layer_number=1,
            attn_mask_type=AttnMaskType.padding_causal,
            attention_type="self",
            pg_collection=self.state.groups,
        )
        unit = self.rows // 16
        lengths = (5 * unit - 3, 7 * unit + 3, 3 * unit, unit)
        routing = _packed(lengths, device=self.state.device)
        heads, groups, dim = (
            self.model.num_attention_heads,
            self.model.num_kv_heads,
            self.model.head_dim,
        )
        inputs = [
            self.tensor(self.rows, n, dim, seed=i) for i, n in enumerate((heads, groups, groups))
        ]

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = module(
                q, k, v, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=routing
            )
            return out

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            samples = zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
            out = [
                F.scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, enable_gqa=True
                )[0]
                for q, k, v in samples
            ]
            return torch.cat(out, dim=1).transpose(0, 1).flatten(1)

        results = {}
        for name, call, dtype in (
            ("found", ours, inputs[0].dtype),
            ("reference", plain, torch.float64),
            ("torch", plain, inputs[0].dtype),
        ):
            leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
            out = call(*leaves)
            torch.autograd.backward(out, self.tensor(*out.shape, seed=4).to(dtype))
            results[name] = {"out": out.detach()} | {
                f"d {n}": leaf.grad
                for n, leaf in zip("qkv", leaves, strict=True)
                if leaf.grad is not None
            }
        return {
            "errors": _errors(results["found"], results["reference"]),
            "errors_of_torch": _errors(results["torch"], results["reference"]),
        }


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _plain(x: Tensor, *, weights: dict[str, Tensor], eps: float) -> Tensor:
    """A norm, a linear or both, by the names of their weights."""
    gamma = weights.get("layer_norm_weight")
    if "weight" in weights and weights["weight"].dim() == 1:
        gamma = weights["weight"]
    if gamma is not None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = gamma * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weights.get("weight") is gamma:
        return x
    return F.linear(x, weights["weight"], weights.get("bias"))


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    return {name: round(relative_error(found[name], expected[name]), 8) for name in expected}


def _packed(lengths: tuple[int, ...], *, device: torch.device) -> ModalityPackedSeqParams:
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    places = torch.arange(sum(lengths), device=device)
    return ModalityPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        num_vision=0,
        num_local_vision=0,
        sequence_lengths=lengths,
        to_sequence=places,
        to_rows=places,
    )


def modules(setting: Setting, rows: Rows) -> None:
    """Part `modules`."""
    for gpu in (PLAIN_GPU, *(GpuConfig(fp8=recipe) for recipe in setting.recipes)):
        bench, recipe = ModuleBench(setting, gpu=gpu), gpu.fp8
        precision = setting.dtype if recipe == "none" else f"FP8 {recipe}"
        for name, case in _cases(bench).items():
            rows.attempt(f"{precision}: {name}", case)


def _cases(bench: ModuleBench) -> dict[str, Callable[[], dict[str, Any]]]:
    model, fused = bench.model, bench.classes.norm_column_linear
    qkv = model.hidden_size + 2 * model.num_kv_heads * model.head_dim
    ffn = model.ffn_hidden_size

    def column(branch: type, *, width: int, name: str) -> Callable[[], dict[str, Any]]:
        bias = name == "qkv"
        return lambda: bench.linear_errors(bench.column(branch, width=width, name=name, bias=bias))

    cases = {
        "column, bias": column(bench.classes.column_linear, width=qkv, name="qkv"),
        "row": lambda: bench.linear_errors(bench.row(width=ffn, name="fc2")),
    }
    if fused is not None:
        cases["norm and column, bias"] = column(fused, width=qkv, name="qkv")
        cases["norm and column"] = column(fused, width=2 * ffn, name="fc1")
    if bench.gpu.fp8 == "none":
        cases["norm"] = lambda: bench.linear_errors(bench.norm())
        cases["attention, packed"] = bench.attention_errors
        cases["partitioned, text frozen"] = bench.partitioned_errors
    return cases
