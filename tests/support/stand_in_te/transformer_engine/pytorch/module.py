# SPDX-License-Identifier: Apache-2.0
"""Stand-in, see transformer_engine/__init__.py: linears with the norm before them, and norms."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

E4M3_MAX = 448.0


class _Module(torch.nn.Module):
    """What all modules of the release have that the product or megatron-core touches."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def fast_setattr(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


class Linear(_Module):
    """y = x W^T + b, with its tensor-parallel communication."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.tp_group, self.tp_size = tp_group, tp_size
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.save_original_input = save_original_input
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.weight = torch.nn.Parameter(
            torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        )
        init_method(self.weight)
        if bias:
            self.bias = torch.nn.Parameter(
                torch.zeros(self.out_features, dtype=params_dtype, device=device)
            )
        else:
            self.bias = torch.empty(0, dtype=params_dtype, device=device)  # type: ignore[assignment]
        sharded = [self.weight, *([self.bias] if bias and parallel_mode == "column" else [])]
        for param in sharded:
            param.tensor_model_parallel = parallel_mode in ("column", "row")  # type: ignore[union-attr]
            param.partition_dim = 0 if parallel_mode == "column" else 1  # type: ignore[union-attr]
            param.partition_stride = 1  # type: ignore[union-attr]
        self.forwards_in_fp8 = self.forwards_in_bf16 = 0  # for tests
        self.scales: dict[str, float] = {}

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        return self._product(inp)

    def _product(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.sequence_parallel:
            x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        elif self.parallel_mode == "column":
            x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        weight, bias = self.weight, self.bias if self.use_bias else None
        if FP8GlobalStateManager.is_fp8_enabled():
            self.forwards_in_fp8 += 1
            x, weight = self._rounded(x, "input"), self._rounded(weight, "weight")
        else:
            self.forwards_in_bf16 += 1
        out = F.linear(x, weight, bias)
        if self.parallel_mode == "row" and self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        if self.parallel_mode == "row":
            return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out

    def _rounded(self, x: Tensor, name: str) -> Tensor:
        """Through float8_e4m3 and back; gradients pass."""
        assert x.shape[:-1].numel() % 8 == 0 and x.shape[-1] % 16 == 0  # as the release asserts
        scale = E4M3_MAX / max(float(x.detach().abs().max()), 1e-12)
        self.scales[name] = scale
        rounded = (x.detach() * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale
        return x + (rounded - x).detach()


class LayerNormLinear(Linear):
    """A norm and the linear behind it; the norm's weight is called layer_norm_weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            tp_group=tp_group,
            tp_size=tp_size,
            init_method=init_method,
            bias=bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        assert normalization == "RMSNorm" and not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(in_features, dtype=params_dtype, device=device)
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        return self._product(_rms_norm(inp, self.layer_norm_weight, self.eps))


class RMSNorm(_Module):
    """Parameter `weight`."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.eps = eps
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = torch.nn.Parameter(
            torch.ones(size, dtype=params_dtype, device=kwargs.get("device", "cuda"))
        )
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


class GroupedLinear(_Module):
    """Only there to be derived from; the product does not use it."""


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
