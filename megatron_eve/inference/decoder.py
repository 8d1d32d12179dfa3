# SPDX-License-Identifier: Apache-2.0
"""EVEv2 for inference: a prefill in which every token runs through its own branch, and a decode step that reads the
text branch's weights only.

No blend, no mask over modalities, no branch on tokens that are not its own. After the last layer's attention the
prefill goes on with each prompt's last token alone, since nothing else is read. Parameter names are the official ones,
so weights need no table. Numerics as in the official code: norms in float32 that cast back before they multiply by the
weight; RoPE's table in float32, then cast; logits in float32. Held against tests/support/reference_eve.py.

Legend: T rows in modality order, V vision rows (first), R prompts or requests, H hidden, N query heads, G key/value
heads, D head dim, C tokens in the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_eve.config.decoder import Linear, decoder_layer, patch_convolutions
from megatron_eve.config.schema import ModelConfig
from megatron_eve.data.sample import VISION_CLS, VISION_PATCH
from megatron_eve.inference.cache import KeyValueCache
from megatron_eve.inference.ragged import RaggedPrompts


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin of each row's position, [rows, 1, D]."""

    cos: Tensor
    sin: Tensor

    def of(self, rows: Tensor) -> "Rotary":
        """The table's lines for `rows`."""
        return Rotary(self.cos[rows], self.sin[rows])

    def turn(self, x_TND: Tensor) -> Tensor:
        """Rotary embedding, half-rotation layout."""
        first, second = x_TND.chunk(2, dim=-1)
        return x_TND * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def rotary_table(model: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> Rotary:
    """The table of all positions up to `max_position_embeddings`; float32 angles, then cast."""
    exponent = torch.arange(0, model.head_dim, 2, dtype=torch.int64, device=device).float()
    positions = torch.arange(model.max_position_embeddings, device=device).float()
    angles = torch.outer(positions, 1.0 / model.rope_theta ** (exponent / model.head_dim))
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def by_branch(text: nn.Module, vision: nn.Module | None, rows: Tensor, num_vision: int) -> Tensor:
    """The first `num_vision` rows through `vision`, the others through `text`; all through `text` if not split."""
    if vision is None or num_vision == 0:
        out: Tensor = text(rows)
    elif num_vision == len(rows):
        out = vision(rows)
    else:
        out = torch.cat((vision(rows[:num_vision]), text(rows[num_vision:])))
    return out


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """What all layers share in one decode step."""

    cache: KeyValueCache
    rotary: Rotary  # of each row's new token
    positions: Tensor  # [R] where the new tokens go
    longest: int  # tokens in the longest row, the new one included
    visible: Tensor | None  # [R, 1, 1, longest] bool; None: all of it, a single row


class RmsNorm(nn.Module):
    """In float32; casts back before it multiplies by the weight, as Qwen2 does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def linears_of(row: Linear, *, moe: str = "") -> dict[str, nn.Linear]:
    """A row of the decoder's table as the modules that Hugging Face has, by their names there."""
    return {
        part.hf.rpartition(".")[2].format(moe=moe): nn.Linear(
            row.inputs, part.rows, bias=row.has_bias
        )
        for part in row.parts
    }


class SwiGlu(nn.Module):
    """The FFN of one branch."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        table = decoder_layer(model)
        for name, linear in (linears_of(table.fc1) | linears_of(table.fc2)).items():
            self.register_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    """Joint causal attention; `moe_*` projections are the vision branch's and may not exist."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, model.head_dim
        table = decoder_layer(model)
        for moe in ("", "moe_"):
            for row in (table.qkv, table.proj):
                exists = not moe or row.is_split(model.split)
                for name, linear in linears_of(row, moe=moe).items():
                    self.register_module(name, linear if exists else None)

    def _project(self, name: str, rows: Tensor, num_vision: int) -> Tensor:
        text, vision = self.get_submodule(name), self._modules[f"moe_{name}"]
        return by_branch(text, vision, rows, num_vision)

    def heads(self, name: str, rows: Tensor, num_vision: int = 0) -> Tensor:
        """[T, H] -> [T, heads, D]."""
        return self._project(name, rows, num_vision).unflatten(-1, (-1, self.head_dim))

    def prefill(
        self,
        x_TH: Tensor,
        batch: RaggedPrompts,
        rotary: Rotary,
        *,
        cache: KeyValueCache,
        rows: Sequence[int],
        last_only: bool,
    ) -> Tensor:
        """Fill `cache` rows and return [T, H], or [R, H] of the last tokens if `last_only`."""
        keys = rotary.turn(self.heads("k_proj", x_TH, batch.num_vision))
        values = self.heads("v_proj", x_TH, batch.num_vision)
        num_vision = batch.num_last_vision if last_only else batch.num_vision
        if last_only:
            x_TH, rotary = x_TH[batch.last_rows], rotary.of(batch.last_rows)
        queries = rotary.turn(self.heads("q_proj", x_TH, num_vision))
        to_sequence = batch.to_prompts if last_only else batch.to_sequence
        queries, keys, values = (
            queries[to_sequence],
            keys[batch.to_sequence],
            values[batch.to_sequence],
        )
        mixed = []
        for index, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            k, v = (t[start : start + length].transpose(0, 1) for t in (keys, values))
            cache.store_prompt(self.layer, row=rows[index], keys=k, values=v)
            own = slice(index, index + 1) if last_only else slice(start, start + length)
            q = queries[own].transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(
                q, k[None], v[None], is_causal=not last_only, enable_gqa=True
            )
            mixed.append(out[0].transpose(0, 1).flatten(1))
        to_rows = batch.last_prompts if last_only else batch.to_rows
        return self._project("o_proj", torch.cat(mixed)[to_rows], num_vision)

    def decode(self, x_RH: Tensor, step: DecodeStep) -> Tensor:
        """One text token for each of the cache's first R rows."""
        cache, rotary = step.cache, step.rotary
        keys = rotary.turn(self.heads("k_proj", x_RH))
        values = self.heads("v_proj", x_RH)
        cache.append(self.layer, positions=step.positions, keys=keys, values=values)
        queries = rotary.turn(self.heads("q_proj", x_RH))[:, :, None]  # [R, N, 1, D]
        k = cache.keys[self.layer][: len(x_RH), :, : step.longest]
        v = cache.values[self.layer][: len(x_RH), :, : step.longest]
        out = F.scaled_dot_product_attention(queries, k, v, attn_mask=step.visible, enable_gqa=True)
        return self._project("o_proj", out.flatten(1), 0)


class Layer(nn.Module):
    """Pre-norm layer; norms, attention and FFN each with or without weights of their own for vision tokens."""

    moe_mlp: SwiGlu | None
    moe_input_layernorm: RmsNorm | None
    moe_post_attention_layernorm: RmsNorm | None

    def __init__(self, model: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps, split = model.hidden_size, model.rms_norm_eps, model.split
        self.self_attn = Attention(model, layer)
        self.mlp = SwiGlu(model)
        self.moe_mlp = SwiGlu(model) if split.ffn else None
        self.input_layernorm = RmsNorm(width, eps)
        self.post_attention_layernorm = RmsNorm(width, eps)
        self.moe_input_layernorm = RmsNorm(width, eps) if split.norm else None
        self.moe_post_attention_layernorm = RmsNorm(width, eps) if split.norm else None

    def prefill(
        self,
        h_TH: Tensor,
        batch: RaggedPrompts,
        rotary: Rotary,
        *,
        cache: KeyValueCache,
        rows: Sequence[int],
        last_only: bool,
    ) -> Tensor:
        """[T, H] -> [T, H], or [R, H] if `last_only`."""
        x = by_branch(self.input_layernorm, self.moe_input_layernorm, h_TH, batch.num_vision)
        mixed = self.self_attn.prefill(
            x, batch, rotary, cache=cache, rows=rows, last_only=last_only
        )
        num_vision = batch.num_last_vision if last_only else batch.num_vision
        h_TH = (h_TH[batch.last_rows] if last_only else h_TH) + mixed
        norms = (self.post_attention_layernorm, self.moe_post_attention_layernorm)
        x = by_branch(*norms, h_TH, num_vision)
        return h_TH + by_branch(self.mlp, self.moe_mlp, x, num_vision)

    def decode(self, h_RH: Tensor, step: DecodeStep) -> Tensor:
        """[R, H] -> [R, H], text branch only."""
        h_RH = h_RH + self.self_attn.decode(self.input_layernorm(h_RH), step)
        out: Tensor = h_RH + self.mlp(self.post_attention_layernorm(h_RH))
        return out


class PatchEmbedding(nn.Module):
    """Two convolutions on non-overlapping windows: two matrix products. CLS first, SPL after each row."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.ModuleDict()
        for name, convolution in zip(("0", "2"), patch_convolutions(model), strict=True):
            channels, height, width = convolution.inputs
            self.patch_embedding[name] = nn.Conv2d(
                channels, convolution.outputs, kernel_size=(height, width), stride=(height, width)
            )
        self.class_embedding = nn.Parameter(torch.empty(model.hidden_size))
        self.split_embedding = nn.Parameter(torch.empty(model.hidden_size))

    def forward(self, pixels: Tensor, kinds: Tensor) -> Tensor:
        """Normalised pixels [P, d*d, 3*p*p] and kinds [V] -> [V, H]."""
        first, second = (self.patch_embedding[name] for name in ("0", "2"))
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
        x = F.gelu(F.linear(pixels.to(first.weight.dtype), first.weight.flatten(1), first.bias))
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in x
        x = F.linear(x.flatten(1), weight, second.bias)
        is_class = (kinds == VISION_CLS)[:, None]
        tokens = torch.where(is_class, self.class_embedding, self.split_embedding)
        return tokens.index_copy(0, (kinds == VISION_PATCH).nonzero()[:, 0], x)


class Decoder(nn.Module):
    """The official names' `model`: patch embedding, token embedding, layers, final norm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.vision_tower = PatchEmbedding(model)
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model, index) for index in range(model.num_layers))
        self.norm = RmsNorm(model.hidden_size, model.rms_norm_eps)


class EveForInference(nn.Module):
    """Prefill and decode. Built on the meta device and given its weights by weights.py."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def prefill(
        self,
        batch: RaggedPrompts,
        pixels: Tensor,
        rotary: Rotary,
        *,
        cache: KeyValueCache,
        rows: Sequence[int],
    ) -> Tensor:
        """Whole prompts into rows of the cache; logits [R, vocabulary] of their next tokens, float32."""
        h_TH = self.model.embed_tokens(batch.text_ids)
        if batch.num_vision:
            h_TH = torch.cat((self.model.vision_tower(pixels, batch.vision_kinds), h_TH))
        own = rotary.of(batch.positions)
        last = len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer)
            h_TH = layer.prefill(h_TH, batch, own, cache=cache, rows=rows, last_only=index == last)
        return self._logits(h_TH[batch.to_prompts])

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        rotary: Rotary,
        *,
        cache: KeyValueCache,
        longest: int,
    ) -> Tensor:
        """One more token [R] at `positions` [R] in each of the first R rows; logits [R, vocabulary], float32."""
        visible = None
        if len(tokens) > 1:
            places = torch.arange(longest, device=positions.device)
            visible = (places <= positions[:, None])[:, None, None]
        step = DecodeStep(cache, rotary.of(positions), positions, longest, visible)
        h_RH = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            h_RH = layer.decode(h_RH, step)
        return self._logits(h_RH)

    def _logits(self, h_RH: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        weight = self.model.embed_tokens.weight if tied else self.lm_head.weight
        return F.linear(self.model.norm(h_RH), weight).float()
