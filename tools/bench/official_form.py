# SPDX-License-Identifier: Apache-2.0
"""What official EVEv2 training executes, written anew to be measured against: the function is ours, the work is not.

Facts it reproduces (baaivision/EVE, EVEv2; observed, no code taken): samples padded on the right to the longest of the
micro-batch; every norm and linear that is split computes both branches on all tokens, padding included, and a 0/1 mask
[B, S, 1] blends them; key/value heads are repeated for the queries; scaled_dot_product_attention gets a dense additive
[B, 1, S, S] mask as soon as one sample is padded, `is_causal` otherwise; each layer is recomputed in the backward;
images go through two convolutions one by one; logits and float32 cross entropy cover all positions. Frozen weights get
no weight gradient. In stage 1 the official model is dense, and so is this one. Left out: the 32 x 32 pixel dummy image
of a sample without one, whose features are thrown away.

Parameter names are the official ones, so that checkpoints_convert loads our weights into it. The loss comes as a sum;
who steps divides.

Legend: B samples, S longest of them, h hidden size, N query heads, D head dim, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_eve.config.schema import ModelConfig, TrainableGroup
from megatron_eve.data.sample import IGNORE
from megatron_eve.metrics.flops import DECODER, Work, matrix_products
from megatron_eve.model.patch_embedding import CLIP_MEAN, CLIP_STD
from tools.bench.samples import BenchSample


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatch:
    """A micro-batch as the official collator and splice leave it."""

    ids: Tensor  # [B, S] int64; 0 for vision tokens and padding
    labels: Tensor  # [B, S] int64, not shifted; IGNORE for vision tokens, prompts and padding
    is_vision: Tensor  # [B, S] bool
    lengths: Tensor  # [B] int64
    images: tuple[Tensor, ...]  # [3, H, W] float, normalised, in the order of their tokens
    num_patches: int  # vision tokens without CLS and SPL


def padded_batch(
    samples: Sequence[BenchSample], *, model: ModelConfig, device: torch.device
) -> PaddedBatch:
    """Pad to the longest of these samples and normalise their pixels."""
    expanded = [sample.expanded(pixels_per_token=model.pixels_per_token) for sample in samples]
    size = max(one.ids.size for one in expanded)
    ids = torch.zeros(len(samples), size, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    is_vision = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(expanded):
        vision = torch.from_numpy(one.is_vision)
        ids[row, : vision.numel()] = torch.from_numpy(one.ids).masked_fill(vision, 0)
        labels[row, : vision.numel()] = torch.from_numpy(one.labels)
        is_vision[row, : vision.numel()] = vision
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for s in samples for image in s.images]
    return PaddedBatch(
        ids=ids.to(device),
        labels=labels.to(device),
        is_vision=is_vision.to(device),
        lengths=torch.tensor([one.ids.size for one in expanded], device=device),
        images=tuple(((image.float() / 255 - mean) / std).to(device) for image in pixels),
        num_patches=sum(image[0].numel() for image in pixels) // model.pixels_per_token**2,
    )


@dataclass(frozen=True, slots=True)
class TokenContext:
    """What every layer needs to know about the tokens of a micro-batch."""

    vision: Tensor  # [B, S, 1]: 1 on vision tokens, in the activations' dtype
    cos: Tensor  # [S, D]
    sin: Tensor  # [S, D]
    attention_mask: Tensor | None  # [B, 1, S, S] additive; None: no padding, plain causal


class BothBranches(nn.Module):
    """Mixes into a module: `name` for text and `moe_name` for vision tokens, both computed, then blended."""

    def _both(self, name: str, x: Tensor, tokens: TokenContext) -> Tensor:
        text = getattr(self, name)(x)
        if not hasattr(self, f"moe_{name}"):
            return text
        return text * (1 - tokens.vision) + getattr(self, f"moe_{name}")(x) * tokens.vision


class OfficialNorm(nn.Module):
    """RMSNorm; normalises in fp32, multiplies in the input's dtype."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(model.hidden_size))
        self.eps = model.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        variance = wide.square().mean(dim=-1, keepdim=True)
        return self.weight * (wide * (variance + self.eps).rsqrt()).to(x.dtype)


class OfficialAttention(BothBranches):
    """Joint causal attention between projections that may be split."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim = model.head_dim
        self.queries_per_key = model.num_attention_heads // model.num_kv_heads
        query = model.num_attention_heads * model.head_dim
        key = model.num_kv_heads * model.head_dim
        for branch in ("", "moe_") if model.split.attention else ("",):
            for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
                self.add_module(branch + name, nn.Linear(model.hidden_size, rows))
            self.add_module(f"{branch}o_proj", nn.Linear(query, model.hidden_size, bias=False))

    def forward(self, x: Tensor, tokens: TokenContext) -> Tensor:
        query, key, value = (
            self._both(name, x, tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = (_rotated(heads, tokens) for heads in (query, key))
        key, value = (t.repeat_interleave(self.queries_per_key, dim=1) for t in (key, value))
        mask = tokens.attention_mask
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        return self._both("o_proj", mixed.transpose(1, 2).flatten(2), tokens)


def _rotated(heads_BNSD: Tensor, tokens: TokenContext) -> Tensor:
    low, high = heads_BNSD.chunk(2, dim=-1)
    return heads_BNSD * tokens.cos + torch.cat((-high, low), dim=-1) * tokens.sin


class OfficialFfn(nn.Module):
    """SwiGLU of one branch."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_hidden_size, model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OfficialLayer(BothBranches):
    """Pre-norm decoder layer."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        for branch in ("", "moe_") if model.split.norm else ("",):
            self.add_module(f"{branch}input_layernorm", OfficialNorm(model))
            self.add_module(f"{branch}post_attention_layernorm", OfficialNorm(model))
        for branch in ("", "moe_") if model.split.ffn else ("",):
            self.add_module(f"{branch}mlp", OfficialFfn(model))
        self.self_attn = OfficialAttention(model)

    def forward(self, hidden: Tensor, tokens: TokenContext) -> Tensor:
        """[B, S, h] -> [B, S, h]."""
        hidden = hidden + self.self_attn(self._both("input_layernorm", hidden, tokens), tokens)
        x = self._both("post_attention_layernorm", hidden, tokens)
        return hidden + self._both("mlp", x, tokens)


class OfficialVisionTower(nn.Module):
    """Two convolutions on one image; CLS first, SPL after each row."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width, first, second = model.patch_embed_dim, model.patch_stride, model.dense_stride
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=first, stride=first),
            nn.GELU(),
            nn.Conv2d(width, model.hidden_size, kernel_size=second, stride=second),
        )
        self.class_embedding = nn.Parameter(torch.zeros(model.hidden_size))
        self.split_embedding = nn.Parameter(torch.zeros(model.hidden_size))

    def forward(self, image_CHW: Tensor) -> Tensor:
        """[3, H, W] -> [rows * cols + rows + 1, h]."""
        features = self.patch_embedding(image_CHW.to(self.class_embedding.dtype)[None])[0]
        ends = self.split_embedding[:, None, None].expand(-1, features.shape[1], 1)
        tokens = torch.cat([features, ends], dim=2).flatten(1).transpose(0, 1)
        return torch.cat([self.class_embedding[None], tokens])


class OfficialDecoder(nn.Module):
    """Everything below the output layer; exists for the official names."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.vision_tower = OfficialVisionTower(model)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(OfficialLayer(model) for _ in range(model.num_layers))
        self.norm = OfficialNorm(model)


class OfficialForm(nn.Module):
    """The whole model; see the module docstring. Embeddings are untied."""

    def __init__(self, model: ModelConfig, *, recompute: bool) -> None:
        super().__init__()
        self.model_config, self.recompute = model, recompute
        self.model = OfficialDecoder(model)
        self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Cross entropy summed over the targets of the micro-batch, 0-d float32."""
        hidden = self._embed(batch)
        tokens = self._tokens(batch, dtype=hidden.dtype)
        for layer in self.model.layers:
            if self.recompute and hidden.requires_grad:
                hidden = checkpoint(layer, hidden, tokens, use_reentrant=True)
            else:
                hidden = layer(hidden, tokens)
        logits = self.lm_head(self.model.norm(hidden)).float()
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def _embed(self, batch: PaddedBatch) -> Tensor:
        hidden = self.model.embed_tokens(batch.ids)
        if not batch.images:
            return hidden
        features = torch.cat([self.model.vision_tower(image) for image in batch.images])
        return hidden.masked_scatter(batch.is_vision[:, :, None], features)

    def _tokens(self, batch: PaddedBatch, *, dtype: torch.dtype) -> TokenContext:
        size, where = batch.ids.shape[1], batch.ids.device
        dim, base = self.model_config.head_dim, self.model_config.rope_theta
        frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=where).float() / dim)
        angles = torch.outer(torch.arange(size, device=where).float(), frequencies).repeat(1, 2)
        return TokenContext(
            vision=batch.is_vision[:, :, None].to(dtype),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            attention_mask=_causal_padding_mask(batch.lengths, size=size, dtype=dtype),
        )


def _causal_padding_mask(lengths: Tensor, *, size: int, dtype: torch.dtype) -> Tensor | None:
    """[B, 1, S, S]: the dtype's minimum where a token must not look, 0 elsewhere; None if no sample is padded."""
    if bool((lengths == size).all()):
        return None
    place = torch.arange(size, device=lengths.device)
    hidden = (place[None, :] > place[:, None]) | (place >= lengths[:, None, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill(hidden, torch.finfo(dtype).min)[:, None]


def freeze_official(form: OfficialForm, *, trainable: tuple[TrainableGroup, ...]) -> None:
    """The official rule: `vision_tower` in the name, else `moe`, else the language model."""
    for name, param in form.named_parameters():
        group: TrainableGroup = "vision" if "moe_" in name else "text"
        param.requires_grad_(("patch_embedding" if "vision_tower" in name else group) in trainable)


def official_flops(
    batch: PaddedBatch,
    *,
    model: ModelConfig,
    trainable: tuple[TrainableGroup, ...],
    recompute: bool = True,
) -> int:
    """FLOPs that this form executes in forward and backward of a micro-batch; conventions of docs/flops.md.

    Every row goes through both branches, to the end of the last layer and through the output layer; a dense mask saves
    attention nothing. Of a model that is split in all its parts or in none. tests/tools/test_bench.py counts the same.
    """
    split = model.split
    assert split.norm == split.attention == split.ffn, f"official training has no {split}"
    rows, size = batch.ids.numel(), batch.ids.shape[1]
    pairs = rows * (size + 1) // 2 if bool((batch.lengths == size).all()) else rows * size
    vision = rows if split.ffn else 0
    products = matrix_products(
        model,
        Work(
            patches=batch.num_patches,
            vision=vision,
            text=rows,
            pairs=pairs,
            last_vision=vision,
            last_text=rows,
            query_vision=vision,
            query_text=rows,
            last_pairs=pairs,
            labels=rows,
        ),
        trainable=trainable,
        input_requires_grad={"vision": True, "text": True},  # one tensor
    )
    flops = sum(one.total for one in products.values())
    flops += products["attention"].forward // 2  # the kernel's backward computes the scores again
    return flops + recompute * sum(products[name].forward for name in DECODER)
