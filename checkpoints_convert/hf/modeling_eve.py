# SPDX-License-Identifier: Apache-2.0
"""EVEv2 for transformers: a Qwen2 decoder that reads pixels itself and has its own weights for vision tokens.

Parameter names are those of baaivision/EVE (EVEv2): text weights keep Qwen2's names, vision weights carry `moe_`.
The official code runs both sets of weights on all tokens and blends them by a mask. Here every token goes through
its own weights only: the real tokens of a batch are sorted once, vision tokens first, so that each linear and each
norm works on two contiguous slices; padding rows are dropped. Attention alone sees the padded [B, L] order. The
results are equal. Tokens are routed by their kind (`token_kinds`), never by the length of the input, so that a
prompt that is an image and nothing else works; generated tokens are text.

`token_kinds` and `pixel_values` come from EVEProcessor. At a vision token, `input_ids` holds a filler.

Legend: B batch, L padded length, T real tokens, V vision tokens among them, H hidden, N query heads, G key/value
heads, D head dim, P patch tokens of a sample.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .chat_eve import EVEChatMixin
from .configuration_eve import EVEQwen2Config
from .modality_eve import (
    CLS,
    PATCH,
    TEXT,
    TokenOrder,
    attention_bias,
    by_modality,
    check_inputs,
    position_ids,
    select_patches,
)


class EVERMSNorm(nn.Module):
    """RMSNorm in float32 that casts back before it multiplies by the weight, as Qwen2 does."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class EVEMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: EVEQwen2Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotary_table(
    positions_BL: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, D], computed in float32, then cast."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions_BL.device).float()
    angles = positions_BL[..., None].float() * (1.0 / theta ** (exponent / head_dim))
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BNLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-rotation layout."""
    first, second = x_BNLD.chunk(2, dim=-1)
    return x_BNLD * cos + torch.cat((-second, first), dim=-1) * sin


class EVEAttention(nn.Module):
    """Joint causal attention over vision and text tokens; the projections may be split."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    moe_q_proj: nn.Linear | None
    moe_k_proj: nn.Linear | None
    moe_v_proj: nn.Linear | None
    moe_o_proj: nn.Linear | None

    def __init__(self, config: EVEQwen2Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.head_dim
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        query, key = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        for prefix in ("", "moe_"):
            exists = prefix == "" or config.splits("self_attn")
            shapes = {"q": (query, True), "k": (key, True), "v": (key, True)}
            for name, (width, bias) in shapes.items():
                linear = nn.Linear(config.hidden_size, width, bias=bias) if exists else None
                self.register_module(f"{prefix}{name}_proj", linear)
            output = nn.Linear(query, config.hidden_size, bias=False) if exists else None
            self.register_module(f"{prefix}o_proj", output)

    def heads(self, x_TX: Tensor, order: TokenOrder) -> Tensor:
        """[T, N * D] -> [B, N, L, D]."""
        return order.scatter(x_TX).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x_TH: Tensor,
        order: TokenOrder,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: DynamicCache | None,
    ) -> Tensor:
        num_vision = order.num_vision
        q = self.heads(by_modality(self.q_proj, self.moe_q_proj, x_TH, num_vision), order)
        k = self.heads(by_modality(self.k_proj, self.moe_k_proj, x_TH, num_vision), order)
        v = self.heads(by_modality(self.v_proj, self.moe_v_proj, x_TH, num_vision), order)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        k, v = (t.repeat_interleave(self.group_size, dim=1) for t in (k, v))
        is_causal = mask is None and order.length > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        out_TX = order.gather(out.transpose(1, 2).flatten(2))
        return by_modality(self.o_proj, self.moe_o_proj, out_TX, num_vision)


class EVEDecoderLayer(nn.Module):
    """Pre-norm layer; norms, attention and FFN each with or without weights of their own for vision tokens."""

    input_layernorm: EVERMSNorm
    post_attention_layernorm: EVERMSNorm
    moe_input_layernorm: EVERMSNorm | None
    moe_post_attention_layernorm: EVERMSNorm | None

    def __init__(self, config: EVEQwen2Config, layer_index: int) -> None:
        super().__init__()
        self.self_attn = EVEAttention(config, layer_index)
        self.mlp = EVEMLP(config)
        self.moe_mlp = EVEMLP(config) if config.splits("mlp") else None
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.add_module(name, EVERMSNorm(config.hidden_size, config.rms_norm_eps))
            vision = None
            if config.splits("layernorm"):
                vision = EVERMSNorm(config.hidden_size, config.rms_norm_eps)
            self.register_module(f"moe_{name}", vision)

    def forward(
        self,
        h_TH: Tensor,
        order: TokenOrder,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: DynamicCache | None,
    ) -> Tensor:
        num_vision = order.num_vision
        x = by_modality(self.input_layernorm, self.moe_input_layernorm, h_TH, num_vision)
        h_TH = h_TH + self.self_attn(x, order, rotary, mask, cache)
        norms = (self.post_attention_layernorm, self.moe_post_attention_layernorm)
        x = by_modality(*norms, h_TH, num_vision)
        return h_TH + by_modality(self.mlp, self.moe_mlp, x, num_vision)


class EVEVisionTower(nn.Module):
    """The patch embedding. Its two convolutions do not overlap, so each is one matrix product over its windows."""

    def __init__(self, config: EVEQwen2Config) -> None:
        super().__init__()
        channels, stride, dense = config.mm_hidden_size, config.patch_stride, config.dense_stride
        self.patch_embedding = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=stride, stride=stride),
            nn.GELU(),
            nn.Conv2d(channels, config.hidden_size, kernel_size=dense, stride=dense),
        )
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.split_embedding = nn.Parameter(torch.randn(config.hidden_size))

    def forward(self, patches: Tensor, kinds_V: Tensor) -> Tensor:
        """Patches [number of PATCH in kinds_V, dense_stride ** 2, 3 * patch_stride ** 2] -> tokens [V, H]."""
        first, second = self.patch_embedding[0], self.patch_embedding[2]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        x = F.linear(patches.to(first.weight.dtype), first.weight.flatten(1), first.bias)
        weight = second.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in x
        x = F.linear(F.gelu(x).flatten(1), weight, second.bias)
        tokens = torch.where((kinds_V == CLS)[:, None], self.class_embedding, self.split_embedding)
        # Under autocast the products are of another dtype than CLS and SPL.
        return tokens.index_copy(0, (kinds_V == PATCH).nonzero()[:, 0], x.to(tokens.dtype))


class EVEQwen2PreTrainedModel(PreTrainedModel):
    """What transformers needs to know to initialise, place and save the weights."""

    config_class = EVEQwen2Config  # type: ignore[assignment]
    base_model_prefix = "model"
    _no_split_modules = ["EVEDecoderLayer"]  # noqa: RUF012 (declared so upstream)
    _skip_keys_device_placement = "past_key_values"  # type: ignore[assignment]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """By torch.nn.init alone: transformers 5 calls this after loading too, and holds those functions back from what
        was loaded, but nothing else."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, EVERMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, EVEVisionTower):
            nn.init.normal_(module.class_embedding)
            nn.init.normal_(module.split_embedding)


class EVEQwen2Model(EVEQwen2PreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: EVEQwen2Config) -> None:
        super().__init__(config)
        self.vision_tower = EVEVisionTower(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            EVEDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = EVERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # set by gradient_checkpointing_enable()
        self.post_init()

    def embed(
        self, input_ids: Tensor, kinds: Tensor, order: TokenOrder, pixels: Tensor | None
    ) -> Tensor:
        """The residual stream's first value, [T, H] in modality order."""
        if order.rows is None:
            return self.embed_tokens(input_ids.flatten())
        vision, text = order.rows[: order.num_vision], order.rows[order.num_vision :]
        embedded = self.embed_tokens(input_ids.flatten()[text])
        if order.num_vision == 0:
            return embedded
        patches = select_patches(kinds, pixels)
        return torch.cat((self.vision_tower(patches, kinds.flatten()[vision]), embedded))

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        token_kinds: Tensor | None,
        pixel_values: Tensor | None,
        cache: DynamicCache | None,
    ) -> Tensor:
        """Hidden states [B, L, H] after the final norm, zeros at padding."""
        length = input_ids.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        kinds = torch.zeros_like(input_ids) if token_kinds is None else token_kinds
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        is_real = None if attention_mask is None else attention_mask[:, past:].bool()
        check_inputs(input_ids, kinds, is_real)
        order = TokenOrder.of(kinds, is_real)
        positions = position_ids(input_ids, attention_mask, past)
        mask = attention_bias(attention_mask, past, length, device=input_ids.device)
        h_TH = self.embed(input_ids, kinds, order, pixel_values)
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        rotary = rotary_table(positions, head_dim=head_dim, theta=theta, dtype=h_TH.dtype)
        # A layer that is computed again must not put its keys and values into the cache again.
        recompute = self.gradient_checkpointing and self.training and cache is None
        for layer in self.layers:
            if recompute:
                h_TH = self._gradient_checkpointing_func(
                    layer.__call__, h_TH, order, rotary, mask, None
                )
            else:
                h_TH = layer(h_TH, order, rotary, mask, cache)
        return order.scatter(self.norm(h_TH))


class EVEQwen2ForCausalLM(EVEQwen2PreTrainedModel, EVEChatMixin, GenerationMixin):  # type: ignore[misc]
    """EVEv2 with its output layer. `generate` takes what EVEProcessor returns; `chat` does all of it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, config: EVEQwen2Config) -> None:
        super().__init__(config)
        self.model = EVEQwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_kinds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every position (or of the last `logits_to_keep`), and the loss if labels are given.

        Args:
            input_ids: [B, L] token ids; a filler at vision tokens.
            attention_mask: [B, past + L], 0 at padding (on either side).
            token_kinds: [B, L] TEXT, PATCH, CLS or SPL; None: all text.
            pixel_values: [B, P, dense_stride ** 2, 3 * patch_stride ** 2] normalised pixels of the patches of each
                sample in reading order, padded to the largest P of the batch.
            labels: [B, L] as input_ids, -100 where there is no target; shifted here.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        hidden_BLH = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_kinds=token_kinds,
            pixel_values=pixel_values,
            cache=past_key_values,
        )
        logits = self.lm_head(hidden_BLH[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=-100)[:, -logits_to_keep:]
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100)
        output = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=past_key_values,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        token_kinds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        cache_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet, their kinds and their patches; new tokens are text.

        The last four are what transformers passes, the first of them until version 4, the others from 5 on; the cache
        itself says how long it is, and the mask where each token stands."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        if token_kinds is None or past >= token_kinds.shape[1]:
            return inputs
        num_new = input_ids.shape[1] - token_kinds.shape[1]
        inputs["token_kinds"] = F.pad(token_kinds, (0, num_new), value=TEXT)[:, past:]
        if pixel_values is not None:
            seen = (token_kinds[:, :past] == PATCH).sum(1).tolist()
            rows = [row[start:] for row, start in zip(pixel_values, seen, strict=True)]
            inputs["pixel_values"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return inputs


__all__ = ["EVEQwen2ForCausalLM", "EVEQwen2Model"]
