# SPDX-License-Identifier: Apache-2.0
"""Which classes make up a decoder layer: the one seam between the model and a backend.

`local` is built from megatron-core's own layers and runs on any device; `te` from Transformer Engine's modules, if
Transformer Engine imports. A checkpoint made with one loads with the other: if a Transformer Engine module holds a norm
and the linear behind it, its norm weight is stored under its name in `local`. Only this file imports megatron-core's
layer classes."""

from dataclasses import dataclass

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_eve.config.megatron import PLAIN_GPU
from megatron_eve.config.schema import GpuConfig, SplitConfig
from megatron_eve.model import te
from megatron_eve.model.attention import EveSelfAttention, VarlenSdpa
from megatron_eve.model.layer import EveTransformerLayer
from megatron_eve.model.norm import RMSNorm
from megatron_eve.model.partitioned import (
    MODALITIES,
    ModalityPartitionedLinear,
    ModalityPartitionedMLP,
    ModalityPartitionedNorm,
)
from megatron_eve.model.two_streams import TwoStreamLinear, TwoStreamMLP


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The classes that do the work."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: type
    norm_column_linear: type | None = None  # a norm and the column-parallel linear after it
    attention: type = EveSelfAttention
    partitioned_linear: type = ModalityPartitionedLinear
    partitioned_mlp: type = ModalityPartitionedMLP


def local_backend(gpu: GpuConfig = PLAIN_GPU) -> Backend:
    """megatron-core's own layers."""
    return Backend(
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        norm=RMSNorm,
        core_attention=VarlenSdpa,
        **_chosen_classes(gpu),
    )


def te_backend(gpu: GpuConfig = PLAIN_GPU) -> Backend:
    """Transformer Engine's modules through megatron-core's wrappers. Never run on a GPU yet: see docs/gpu.md.

    Raises: ConfigError if Transformer Engine cannot be imported.
    """
    classes = te.classes()
    if gpu.modality_streams:
        te.give_each_stream_a_workspace()
    return Backend(**classes, **_chosen_classes(gpu))


def _chosen_classes(gpu: GpuConfig) -> dict[str, type]:
    """The classes that section gpu of the configuration chooses, whatever the backend."""
    chosen: dict[str, type] = {}
    if gpu.modality_streams:
        chosen |= {"partitioned_linear": TwoStreamLinear, "partitioned_mlp": TwoStreamMLP}
    if gpu.fused_rope:
        from megatron_eve.model.fused_rope import FusedRopeSelfAttention  # needs Triton

        chosen["attention"] = FusedRopeSelfAttention
    return chosen


def backend(name: str, *, gpu: GpuConfig = PLAIN_GPU) -> Backend:
    """The backend with this name (train.backend)."""
    return {"local": local_backend, "te": te_backend}[name](gpu)


def layer_spec(split: SplitConfig, *, backend: Backend) -> ModuleSpec:
    """A decoder layer in which the components that `split` names have one set of weights per modality."""
    before_attention = _NormAndLinear(backend, split_norm=split.norm, split_linear=split.attention)
    before_ffn = _NormAndLinear(backend, split_norm=split.norm, split_linear=split.ffn)
    attention = SelfAttentionSubmodules(
        linear_qkv=before_attention.linear,
        core_attention=backend.core_attention,
        linear_proj=_linear(backend, backend.row_linear, split.attention),
    )
    mlp = MLPSubmodules(
        linear_fc1=before_ffn.linear, linear_fc2=_linear(backend, backend.row_linear, split.ffn)
    )
    return ModuleSpec(
        module=EveTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before_attention.norm,
            self_attention=ModuleSpec(module=backend.attention, submodules=attention),
            pre_mlp_layernorm=before_ffn.norm,
            mlp=ModuleSpec(module=backend.partitioned_mlp if split.ffn else MLP, submodules=mlp),
            sharded_state_dict_keys_map={
                **before_attention.stored_as("self_attention.linear_qkv", "input_layernorm"),
                **before_ffn.stored_as("mlp.linear_fc1", "pre_mlp_layernorm"),
            },
        ),
    )


def _linear(backend: Backend, branch: type, partitioned: bool) -> ModuleSpec:
    if not partitioned:
        return ModuleSpec(module=branch)
    return ModuleSpec(module=backend.partitioned_linear, params={"branch": branch})


class _NormAndLinear:
    """A norm and the column-parallel linear after it: one module where the backend has one and both are split, or
    neither is, so that every linear has exactly one norm before it."""

    def __init__(self, backend: Backend, *, split_norm: bool, split_linear: bool) -> None:
        fused = backend.norm_column_linear if split_norm == split_linear else None
        self._fused, self._split = fused is not None, split_norm
        self.linear = _linear(backend, fused or backend.column_linear, split_linear)
        self.norm = ModuleSpec(module=backend.norm)
        if self._fused:
            self.norm = ModuleSpec(module=IdentityOp)
        elif split_norm:
            self.norm = ModuleSpec(module=ModalityPartitionedNorm, params={"branch": backend.norm})

    def stored_as(self, linear: str, norm: str) -> dict[str, str]:
        """Beginnings of the layer's parameter names -> the same in a checkpoint."""
        if not self._fused:
            return {}
        branches = [f".{modality}" for modality in MODALITIES] if self._split else [""]
        return {f"{linear}{branch}.layer_norm_": f"{norm}{branch}." for branch in branches}
