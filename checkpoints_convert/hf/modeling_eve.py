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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_eve import EVEAttention, rotary_table
from .chat_eve import EVEChatMixin
from .configuration_eve import EVEQwen2Config
from .modality_eve import CLS, IGNORED, PATCH, TokenOrder, by_modality, real_targets, select_patches
from .places_eve import EVEDecodingMixin, TokenPlaces


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
        cache: Any,
        slots: Tensor | None,
        with_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and the attention weights if they are asked for.

        Arguments stand alone, not in one object: accelerate brings each tensor to the layer's device."""
        num_vision = order.num_vision
        x = by_modality(self.input_layernorm, self.moe_input_layernorm, h_TH, num_vision)
        attended, weights = self.self_attn(x, order, rotary, mask, cache, slots, with_weights)
        h_TH = h_TH + attended
        norms = (self.post_attention_layernorm, self.moe_post_attention_layernorm)
        x = by_modality(*norms, h_TH, num_vision)
        return h_TH + by_modality(self.mlp, self.moe_mlp, x, num_vision), weights


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
    _supports_cache_class = True  # both are read by versions before 4.56 alone
    _supports_static_cache = True
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
        config.check_computed()
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
        self, input_ids: Tensor, kinds: Tensor | None, order: TokenOrder, pixels: Tensor | None
    ) -> Tensor:
        """The residual stream's first value, [T, H] in modality order."""
        if order.rows is None:
            return self.embed_tokens(input_ids.flatten())
        vision, text = order.rows[: order.num_vision], order.rows[order.num_vision :]
        embedded = self.embed_tokens(input_ids.flatten()[text])
        if order.num_vision == 0:
            return embedded
        assert kinds is not None
        shape = (self.config.dense_stride**2, 3 * self.config.patch_stride**2)
        patches = select_patches(kinds, pixels, shape=shape)
        return torch.cat((self.vision_tower(patches, kinds.flatten()[vision]), embedded))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_kinds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, H] after the final norm, zeros at padding. Arguments as of EVEQwen2ForCausalLM."""
        config = self.config
        if use_cache is None:
            use_cache = bool(config.use_cache) and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        places = TokenPlaces.of(
            input_ids,
            attention_mask=attention_mask,
            token_kinds=token_kinds,
            pixel_values=pixel_values,
            position_ids=position_ids,
            cache=past_key_values,
            cache_position=cache_position,
        )
        h_TH = self.embed(input_ids, token_kinds, places.order, pixel_values)
        rotary = rotary_table(
            places.positions, head_dim=config.head_dim, theta=config.rope_theta, dtype=h_TH.dtype
        )
        asked = config.output_attentions if output_attentions is None else output_attentions
        with_weights = bool(asked) or config._attn_implementation == "eager"
        wanted = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        hidden, attentions = [], []
        for layer in self.layers:
            if wanted:
                hidden.append(places.order.scatter(h_TH))
            given = (places.order, rotary, places.mask, past_key_values, places.slots, with_weights)
            # A layer that is computed again must not put its keys and values into the cache again.
            if self.gradient_checkpointing and self.training and past_key_values is None:
                h_TH, weights = self._gradient_checkpointing_func(layer.__call__, h_TH, *given)
            else:
                h_TH, weights = layer(h_TH, *given)
            attentions.append(weights)
        last = places.order.scatter(self.norm(h_TH))
        return BaseModelOutputWithPast(
            last_hidden_state=last,  # type: ignore[arg-type]
            past_key_values=past_key_values,
            hidden_states=(*hidden, last) if wanted else None,  # type: ignore[arg-type]
            attentions=tuple(attentions) if asked else None,
        )


class EVEQwen2ForCausalLM(EVEQwen2PreTrainedModel, EVEChatMixin, EVEDecodingMixin, GenerationMixin):  # type: ignore[misc]
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
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_kinds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_logits_to_keep: int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of every position (or of the last `logits_to_keep`), and the loss if labels are given.

        None means what config.json says, where it says something. Keywords that are not here are refused.

        Args:
            input_ids: [B, L] token ids; a filler at vision tokens.
            attention_mask: [B, past + L], 0 at padding (on either side).
            token_kinds: [B, L] TEXT, PATCH, CLS or SPL; None: all text.
            pixel_values: [B, P, dense_stride ** 2, 3 * patch_stride ** 2] normalised pixels of the patches of each
                sample in reading order, padded to the largest P of the batch.
            position_ids: [B or 1, L]; None: real tokens are counted.
            past_key_values: a DynamicCache or a StaticCache, which gets the new tokens' keys and values.
            labels: [B, L] as input_ids, -100 where there is no target (padding is none); shifted here.
            use_cache: make a DynamicCache where none is given; not in training unless it is asked for.
            output_attentions: weights of each layer, [B, N, L, keys], zeros or no use at padding.
            output_hidden_states: input of each layer and the last output after its norm, [B, L, H], zeros at padding.
            cache_position: [L] places of the new tokens in a static cache; None: behind the others.
            logits_to_keep: how many last positions (0: all), or which; `num_logits_to_keep` is its old name.
        """
        input_ids = required_ids(input_ids, inputs_embeds)
        kept = kept_positions(logits_to_keep, num_logits_to_keep)
        if labels is not None:
            labels = real_targets(labels, input_ids, token_kinds, attention_mask)
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            token_kinds=token_kinds,
            pixel_values=pixel_values,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            cache_position=cache_position,
        )
        logits = self.lm_head(output.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)[:, kept]
            loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORED)
        found = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        as_object = self.config.return_dict if return_dict is None else return_dict
        return found if as_object else found.to_tuple()


def required_ids(input_ids: Tensor | None, inputs_embeds: Any) -> Tensor:
    """Ids say where the text is; embeddings alone would leave out the pixels."""
    if inputs_embeds is not None:
        raise TypeError(
            "inputs_embeds is not supported: vision tokens are embedded from pixel_values. Pass input_ids, token_kinds "
            "and pixel_values as EVEProcessor returns them."
        )
    if input_ids is None:
        raise TypeError("input_ids is missing; pass what EVEProcessor returns.")
    return input_ids


def kept_positions(logits_to_keep: int | Tensor, old_name: int | None) -> Any:
    """An index of the positions whose logits are computed."""
    if old_name is not None:
        if not isinstance(logits_to_keep, int) or logits_to_keep not in (0, old_name):
            raise ValueError(
                f"logits_to_keep={logits_to_keep} and num_logits_to_keep={old_name}; pass the first alone."
            )
        logits_to_keep = old_name
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep
    if logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep={logits_to_keep}; expected 0 (all) or a number of last positions."
        )
    return slice(-logits_to_keep, None)


__all__ = ["EVEQwen2ForCausalLM", "EVEQwen2Model"]
