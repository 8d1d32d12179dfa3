# SPDX-License-Identifier: Apache-2.0
"""The one table of a decoder layer: its linears and norms, their sizes, biases and names, and which vision may own.

Whatever follows from these facts by arithmetic derives from here: parameter counts and memory (sizes.py), FLOPs
(metrics/flops.py), matrix products and activations (tools/plan), the cost of a pack (data/plan/packing.py), the widths
that FP8 asks for (gpu_checks.py), shapes of stored weights (checkpoint/fit.py), megatron-core's settings (megatron.py),
names and shapes of the converters (checkpoints_convert/names.py), the modules of the inference engine.

Three decoders are written without it, so that they can prove it wrong: megatron-core's layers, which train; the files
of a release (checkpoints_convert/hf), which people use without this package; the tests' plain reference. No torch."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_eve.config.schema import ModelConfig, SplitConfig, TrainableGroup

Owner = Literal["norm", "attention", "ffn"]
"""The field of SplitConfig that decides whether vision tokens have weights of their own."""
Joined = Literal["copy", "qkv", "gate_up"]
"""How the Hugging Face tensors of a row become one tensor (checkpoints_convert/tensors.py)."""
Modality = Literal["vision", "text"]
MODALITIES: tuple[Modality, ...] = ("vision", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What Hugging Face stores alone: `hf` is its module in a layer, `{moe}` where the vision branch says "moe_"."""

    hf: str
    rows: int
    of_queries: bool = False  # in the last layer only queries that are read need it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One module of a layer. `name` is EveModel's, followed by `.vision` or `.text` where each has its own."""

    name: str
    owner: Owner
    parts: tuple[Part, ...]
    joined: Joined = "copy"

    def is_split(self, split: SplitConfig) -> bool:
        """Whether there is one instance for each modality."""
        return {"norm": split.norm, "attention": split.attention, "ffn": split.ffn}[self.owner]

    def group(self, modality: Modality, split: SplitConfig) -> TrainableGroup:
        """The trainable group of the weights that the rows of a modality meet."""
        return "vision" if modality == "vision" and self.is_split(split) else "text"

    @property
    def outputs(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm(Row):
    """An RMSNorm; tensor parallelism replicates it."""

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name of a tensor -> its dims after the first."""
        return {"weight": ()}

    @property
    def parameters(self) -> int:
        return self.outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Row):
    """y = x W^T (+ b), W [outputs, inputs]; tensor parallelism cuts the outputs (column) or the inputs (row)."""

    component: Literal["qkv", "proj", "ffn"]  # as FLOPs and times are reported
    inputs: int
    has_bias: bool
    cut: Literal["outputs", "inputs"]
    kept_rows_only: bool  # the last layer runs it on the rows that something reads

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.inputs,)} | ({"bias": ()} if self.has_bias else {})

    @property
    def weights(self) -> int:
        """Multiply-adds of a row, too."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.has_bias * self.outputs

    def on_rank(self, tensor: int) -> tuple[int, int]:
        """(inputs, outputs) on one of `tensor` ranks."""
        if self.cut == "outputs":
            return self.inputs, self.outputs // tensor
        return self.inputs // tensor, self.outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """The rows of one layer, named."""

    input_norm: Norm
    qkv: Linear
    proj: Linear
    ffn_norm: Norm
    fc1: Linear
    fc2: Linear

    @property
    def rows(self) -> tuple[Norm | Linear, ...]:
        """Rows in the order of the forward pass, which is that of checkpoints and releases."""
        return (self.input_norm, self.qkv, self.proj, self.ffn_norm, self.fc1, self.fc2)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(row for row in self.rows if isinstance(row, Linear))

    @property
    def query_width(self) -> int:
        """Query heads x head dim: what attention gives out, too."""
        return self.qkv.parts[0].rows

    @property
    def key_width(self) -> int:
        """Key/value heads x head dim, of the keys alone."""
        return self.qkv.parts[1].rows


def decoder_layer(model: ModelConfig) -> DecoderLayer:
    """Qwen2.5's layer, in which vision and text may have rows of their own. Source: EVEv2 modeling_eve.py."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim

    def norm(name: str, hf: str) -> Norm:
        return Norm(name=name, owner="norm", parts=(Part(hf=f"{{moe}}{hf}", rows=hidden),))

    return DecoderLayer(
        input_norm=norm("input_layernorm", "input_layernorm"),
        qkv=Linear(
            name="self_attention.linear_qkv",
            owner="attention",
            component="qkv",
            inputs=hidden,
            parts=(
                Part(hf="self_attn.{moe}q_proj", rows=query, of_queries=True),
                Part(hf="self_attn.{moe}k_proj", rows=key),
                Part(hf="self_attn.{moe}v_proj", rows=key),
            ),
            joined="qkv",
            has_bias=True,
            cut="outputs",
            kept_rows_only=False,
        ),
        proj=Linear(
            name="self_attention.linear_proj",
            owner="attention",
            component="proj",
            inputs=query,
            parts=(Part(hf="self_attn.{moe}o_proj", rows=hidden),),
            has_bias=False,
            cut="inputs",
            kept_rows_only=True,
        ),
        ffn_norm=norm("pre_mlp_layernorm", "post_attention_layernorm"),
        fc1=Linear(
            name="mlp.linear_fc1",
            owner="ffn",
            component="ffn",
            inputs=hidden,
            parts=(
                Part(hf="{moe}mlp.gate_proj", rows=ffn),
                Part(hf="{moe}mlp.up_proj", rows=ffn),
            ),
            joined="gate_up",
            has_bias=False,
            cut="outputs",
            kept_rows_only=True,
        ),
        fc2=Linear(
            name="mlp.linear_fc2",
            owner="ffn",
            component="ffn",
            inputs=ffn,
            parts=(Part(hf="{moe}mlp.down_proj", rows=hidden),),
            has_bias=False,
            cut="inputs",
            kept_rows_only=True,
        ),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Convolution:
    """One of the patch embedding's two, on windows that do not overlap: a linear with a bias, `windows` a token."""

    name: str
    inputs: tuple[int, int, int]  # channels, height, width of a window
    outputs: int
    windows: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of its weight."""
        return (self.outputs, *self.inputs)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs


def patch_convolutions(model: ModelConfig) -> tuple[Convolution, Convolution]:
    """Pixels to `patch_embed_dim` channels, and a square of these to a vision token."""
    stride, dense = model.patch_stride, model.dense_stride
    channels = model.patch_embed_dim
    return (
        Convolution(
            name="conv1", inputs=(3, stride, stride), outputs=channels, windows=dense * dense
        ),
        Convolution(
            name="conv2", inputs=(channels, dense, dense), outputs=model.hidden_size, windows=1
        ),
    )
