# SPDX-License-Identifier: Apache-2.0
"""Which class stands where in a decoder layer: the one seam between the model and a backend.

`local` is built from megatron-core's own layers and runs on any device; `te` from Transformer Engine's modules and is
built only where Transformer Engine imports. Both give the same parameter names, so that a checkpoint made with one
loads with the other. The only file that imports megatron-core's layer classes."""

from dataclasses import dataclass

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_eve.config.schema import SplitConfig
from megatron_eve.errors import ConfigError
from megatron_eve.model.attention import EveSelfAttention, VarlenSdpa
from megatron_eve.model.layer import EveTransformerLayer
from megatron_eve.model.norm import RMSNorm
from megatron_eve.model.partitioned import (
    ModalityPartitionedLinear,
    ModalityPartitionedMLP,
    ModalityPartitionedNorm,
)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The classes that do the work."""

    column_linear: type
    row_linear: type
    norm: type
    core_attention: type


def local_backend() -> Backend:
    """megatron-core's own layers."""
    return Backend(
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        norm=RMSNorm,
        core_attention=VarlenSdpa,
    )


def te_backend() -> Backend:
    """Transformer Engine's modules through megatron-core's wrappers. Never run on a GPU yet: see docs/gpu.md.

    Raises: ConfigError if Transformer Engine cannot be imported.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"train.backend=te needs Transformer Engine, which does not import here ({error}); "
            "install the gpu extra or use train.backend=local"
        ) from error
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return Backend(
        column_linear=TEColumnParallelLinear,
        row_linear=TERowParallelLinear,
        norm=TENorm,
        core_attention=TEDotProductAttention,
    )


def backend(name: str) -> Backend:
    """The backend with this name (train.backend)."""
    return {"local": local_backend, "te": te_backend}[name]()


def layer_spec(split: SplitConfig, *, backend: Backend) -> ModuleSpec:
    """A decoder layer in which the components that `split` names have one set of weights per modality."""

    def linear(branch: type, partitioned: bool) -> ModuleSpec:
        if not partitioned:
            return ModuleSpec(module=branch)
        return ModuleSpec(module=ModalityPartitionedLinear, params={"branch": branch})

    norm = ModuleSpec(module=backend.norm)
    if split.norm:
        norm = ModuleSpec(module=ModalityPartitionedNorm, params={"branch": backend.norm})
    attention = SelfAttentionSubmodules(
        linear_qkv=linear(backend.column_linear, split.attention),
        core_attention=backend.core_attention,
        linear_proj=linear(backend.row_linear, split.attention),
    )
    mlp = MLPSubmodules(
        linear_fc1=linear(backend.column_linear, split.ffn),
        linear_fc2=linear(backend.row_linear, split.ffn),
    )
    return ModuleSpec(
        module=EveTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=EveSelfAttention, submodules=attention),
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=ModalityPartitionedMLP if split.ffn else MLP, submodules=mlp),
        ),
    )
