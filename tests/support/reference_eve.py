# SPDX-License-Identifier: Apache-2.0
"""EVEv2 in plain PyTorch, one process, one sample at a time: the ruler for every other code path.

It computes what the official code computes (baaivision/EVE, EVEv2/eve/model: modeling_qwen2.py,
eve_arch.py, vision_tokenizer.py): both branches run on all tokens and a mask blends them, the patch
embedding is two real convolutions, attention is causal over the whole expanded sequence. Parameter
names are the official ones. No megatron-core, no transformers, no code of the product except the
configuration's dataclass.

One deliberate difference: in float64, norms compute in float64 (the official code always goes to
float32), so that float64 tests can ask for 1e-12. RoPE's table is made in float32 and cast, as in
the official code.

Legend: S expanded sequence, H hidden, N query heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eve.config.schema import LossNormalization, ModelConfig

IMAGE_PLACEHOLDER = -200  # stands in `ids` where the tokens of the next image go
IGNORE = -100


@dataclass(frozen=True, slots=True)
class ReferenceSample:
    """A sample before expansion. `labels` are aligned with `ids` (not shifted)."""

    ids: Tensor  # [n] int64, IMAGE_PLACEHOLDER where an image goes
    images: tuple[Tensor, ...] = ()  # normalised float pixels [3, H, W], edges multiples of 32
    labels: Tensor | None = None  # [n] int64; None: every text token is a target


@dataclass(frozen=True, slots=True)
class ReferenceOutput:
    """What the model says about the expanded sequence."""

    logits: Tensor  # [S, V]
    is_vision: Tensor  # [S] bool: patches, CLS and SPL
    labels: Tensor  # [S] int64, IGNORE on vision tokens; not shifted
    loss_sum: Tensor  # 0-d: cross entropy summed over the targets
    num_targets: int


def blend(text: nn.Module, vision: nn.Module | None, x: Tensor, mask: Tensor) -> Tensor:
    """Both branches on all tokens; `mask` [S, 1] is 1 on vision tokens. No `vision`: not split."""
    return text(x) if vision is None else text(x) * (1 - mask) + vision(x) * mask


class ReferenceNorm(nn.Module):
    """RMSNorm that casts back to the input's dtype before it multiplies by the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class ReferenceMlp(nn.Module):
    """SwiGLU."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(model: ModelConfig, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, D], for positions 0..length-1; made in float32, then cast."""
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float() / model.head_dim
    angles = torch.outer(torch.arange(length).float(), 1.0 / model.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_SND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation (GPT-NeoX layout), as in HF's Qwen2."""
    first, second = x_SND.chunk(2, dim=-1)
    return x_SND * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class ReferenceAttention(nn.Module):
    """Joint causal attention; projections may be split by modality."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = model.num_attention_heads, model.num_kv_heads
        hidden, wide = model.hidden_size, self.heads * model.head_dim
        narrow = self.kv_heads * model.head_dim
        for prefix in ("", "moe_") if model.split.attention else ("",):
            self.add_module(f"{prefix}q_proj", nn.Linear(hidden, wide, bias=True))
            self.add_module(f"{prefix}k_proj", nn.Linear(hidden, narrow, bias=True))
            self.add_module(f"{prefix}v_proj", nn.Linear(hidden, narrow, bias=True))
            self.add_module(f"{prefix}o_proj", nn.Linear(wide, hidden, bias=False))

    def project(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        vision = getattr(self, f"moe_{name}_proj", None)
        return blend(getattr(self, f"{name}_proj"), vision, x, mask)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(self.project("q", x, mask).unflatten(-1, (self.heads, -1)), cos, sin)
        k = rotate(self.project("k", x, mask).unflatten(-1, (self.kv_heads, -1)), cos, sin)
        v = self.project("v", x, mask).unflatten(-1, (self.kv_heads, -1))
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # [1, N, S, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
        return self.project("o", out.transpose(0, 1).flatten(1), mask)


class ReferenceLayer(nn.Module):
    """Pre-norm decoder layer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.self_attn = ReferenceAttention(model)
        self.mlp = ReferenceMlp(model)
        self.input_layernorm = ReferenceNorm(model.hidden_size, model.rms_norm_eps)
        self.post_attention_layernorm = ReferenceNorm(model.hidden_size, model.rms_norm_eps)
        split = model.split
        self.moe_mlp = ReferenceMlp(model) if split.ffn else None
        for name in ("moe_input_layernorm", "moe_post_attention_layernorm"):
            norm = ReferenceNorm(model.hidden_size, model.rms_norm_eps) if split.norm else None
            self.register_module(name, norm)

    def forward(self, h: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = blend(self.input_layernorm, self.moe_input_layernorm, h, mask)
        h = h + self.self_attn(x, mask, cos, sin)
        x = blend(self.post_attention_layernorm, self.moe_post_attention_layernorm, h, mask)
        return h + blend(self.mlp, self.moe_mlp, x, mask)


class ReferencePatchEmbedding(nn.Module):
    """Conv, GELU, Conv; CLS in front, SPL after each row of patches."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim, stride, dense = model.patch_embed_dim, model.patch_stride, model.dense_stride
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, dim, kernel_size=stride, stride=stride),
            nn.GELU(),
            nn.Conv2d(dim, model.hidden_size, kernel_size=dense, stride=dense),
        )
        self.class_embedding = nn.Parameter(torch.randn(model.hidden_size))
        self.split_embedding = nn.Parameter(torch.randn(model.hidden_size))

    def forward(self, image_CHW: Tensor) -> Tensor:
        """[3, H, W] -> [rows * cols + rows + 1, hidden]."""
        pixels = image_CHW.to(self.class_embedding.dtype)
        grid = self.patch_embedding(pixels[None])[0]  # [hidden, rows, cols]
        split = self.split_embedding[:, None, None].expand(-1, grid.shape[1], 1)
        rows = torch.cat((grid, split), dim=-1).flatten(1).T
        return torch.cat((self.class_embedding[None], rows))


class ReferenceModel(nn.Module):
    """Everything below the output layer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.vision_tower = ReferencePatchEmbedding(model)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(ReferenceLayer(model) for _ in range(model.num_layers))
        self.norm = ReferenceNorm(model.hidden_size, model.rms_norm_eps)


class ReferenceEve(nn.Module):
    """EVEv2, or a variant by `config.split`. `lm_head` does not exist when embeddings are tied."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = ReferenceModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def expand(self, sample: ReferenceSample) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [S, H], vision mask [S] and labels [S] with the images in place."""
        labels = sample.ids if sample.labels is None else sample.labels
        assert int((sample.ids == IMAGE_PLACEHOLDER).sum()) == len(sample.images)
        images, vision_tower = iter(sample.images), self.model.vision_tower
        rows, kinds, targets = [], [], []
        for token, label in zip(sample.ids, labels, strict=True):
            is_image = int(token) == IMAGE_PLACEHOLDER
            embed = vision_tower if is_image else self.model.embed_tokens
            part = embed(next(images) if is_image else token[None])
            rows.append(part)
            kinds.append(torch.full((len(part),), is_image))
            targets.append(torch.full((len(part),), IGNORE if is_image else int(label)))
        return torch.cat(rows), torch.cat(kinds), torch.cat(targets)

    def forward(self, sample: ReferenceSample) -> ReferenceOutput:
        h, is_vision, labels = self.expand(sample)
        mask = is_vision[:, None].to(h.dtype)
        cos, sin = rotary_table(self.config, len(h), h.dtype)
        for layer in self.model.layers:
            h = layer(h, mask, cos, sin)
        tied = self.config.tie_word_embeddings
        head = self.model.embed_tokens.weight if tied else self.lm_head.weight
        logits = F.linear(self.model.norm(h), head)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_sum = F.cross_entropy(wide[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        num_targets = int((labels[1:] != IGNORE).sum())
        return ReferenceOutput(logits, is_vision, labels, loss_sum, num_targets)


def batch_loss(
    eve: ReferenceEve,
    microbatches: Sequence[Sequence[ReferenceSample]],
    *,
    normalization: LossNormalization = "global_tokens",
) -> Tensor:
    """Loss of one global batch, given as the official code's micro-batches (of all data-parallel ranks).

    `official`: the mean over the targets of each micro-batch, then the mean of these. The others see
    samples, not micro-batches: the mean over all targets; the mean over samples of the mean over
    each one's targets; the mean over all targets, each weighted by 1/sqrt(targets of its sample).
    A sample or micro-batch without a target counts for nothing.
    """
    groups = [[eve(sample) for sample in samples] for samples in microbatches]
    if normalization != "official":
        groups = [[out] for outs in groups for out in outs]
    sums = [torch.stack([out.loss_sum for out in outs]).sum() for outs in groups if outs]
    counts = [sum(out.num_targets for out in outs) for outs in groups if outs]
    power = {"global_tokens": 0.0, "sqrt_tokens": 0.5, "sample_mean": 1.0, "official": 1.0}
    weights = [max(count, 1) ** -power[normalization] for count in counts]
    total = torch.stack([total * w for total, w in zip(sums, weights, strict=True)]).sum()
    of_targets = sum(count * w for count, w in zip(counts, weights, strict=True))
    return total / (of_targets or 1.0)


def build_reference(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> ReferenceEve:
    """A model in which no weight is special: biases not zero, norms not one, branches differ."""
    generator = torch.Generator().manual_seed(seed)
    eve = ReferenceEve(config).to(torch.float64)
    with torch.no_grad():
        for name, parameter in eve.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = "norm" in name
            std = 0.2 if is_norm or name.endswith("bias") else parameter[0].numel() ** -0.5
            parameter.copy_(noise * std + is_norm)
    return eve.to(dtype)
