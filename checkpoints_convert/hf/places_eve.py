# SPDX-License-Identifier: Apache-2.0
"""Where the new tokens of a call stand: in the batch, behind a cache, in the sequence; and the next call of `generate`.

How many tokens came before is said by the mask, the cache and `cache_position`. They are compared where they can be:
a growing cache knows its length, a static one does not (transformers counts its entries that are not zero).

Legend: B batch, L padded length of the new tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_eve import slots_of
from .modality_eve import (
    PATCH,
    TEXT,
    TokenOrder,
    attention_bias,
    check_hidden_images,
    check_inputs,
    check_mask,
    position_ids,
    static_bias,
)


@dataclass(frozen=True)
class TokenPlaces:
    """What the layers need to know of the new tokens."""

    order: TokenOrder
    positions: Tensor  # [B or 1, L] of the rotary embedding
    mask: Tensor | None  # which keys a query may see; None: causal
    slots: Tensor | None  # [L] in a static cache

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        token_kinds: Tensor | None,
        pixel_values: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        cache_position: Tensor | None,
    ) -> "TokenPlaces":
        """Raises: ValueError for inputs that do not fit each other."""
        refuse_tuple(cache)
        check_inputs(input_ids, token_kinds, pixel_values)
        check_positions(input_ids, position_ids)
        num_slots = slots_of(cache)
        if num_slots is not None:
            return cls._static(
                input_ids,
                attention_mask,
                token_kinds,
                position_ids,
                cache,
                cache_position,
                num_slots,
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        length = input_ids.shape[1]
        if attention_mask is not None:
            check_mask(attention_mask, expected=(len(input_ids), past + length), past=past)
            if bool(attention_mask.all()):
                attention_mask = None
        mask = attention_bias(attention_mask, past, length, device=input_ids.device)
        is_real = None if attention_mask is None else attention_mask[:, past:].bool()
        return cls(
            order=order_of(input_ids, token_kinds, is_real),
            positions=_positions(input_ids, attention_mask, past)
            if position_ids is None
            else position_ids,
            mask=mask,
            slots=None,
        )

    @classmethod
    def _static(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_kinds: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        slots: Tensor | None,
        num_slots: int,
    ) -> "TokenPlaces":
        """A decoding step of `generate` brings slots, positions and a mask of the cache's full length: its shapes are
        those of the step before, and nothing in it waits for a value."""
        batch, length = input_ids.shape
        if slots is None:
            past = _past_of_static(cache, attention_mask, length)
            slots = torch.arange(past, past + length, device=input_ids.device)
        if attention_mask is not None and attention_mask.shape[1] != num_slots:
            past = int(slots[0])
            check_mask(attention_mask, expected=(batch, past + length), past=past)
            check_room(past + length, num_slots)
            attention_mask = F.pad(attention_mask, (0, num_slots - past - length))
        if position_ids is None:
            counted = None if attention_mask is None else attention_mask.long().cumsum(1) - 1
            position_ids = slots[None] if counted is None else counted.clamp_min(0)[:, slots]
        is_step = length == 1 and token_kinds is None
        is_real = None
        if attention_mask is not None and not is_step:
            is_real = attention_mask[:, slots].bool()
        return cls(
            order=TokenOrder.all_text(input_ids.shape)
            if is_step
            else order_of(input_ids, token_kinds, is_real),
            positions=position_ids,
            mask=static_bias(attention_mask, slots, num_slots),
            slots=slots,
        )


_positions = position_ids


def order_of(input_ids: Tensor, kinds: Tensor | None, is_real: Tensor | None) -> TokenOrder:
    """The real tokens by modality. Raises: ValueError if an image is padding."""
    if kinds is None:
        kinds = torch.zeros_like(input_ids)
    elif is_real is not None:
        check_hidden_images(kinds, is_real)
    return TokenOrder.of(kinds, is_real)


def refuse_tuple(cache: Any) -> None:
    """The form of caches before transformers 4.36."""
    if isinstance(cache, tuple | list):
        raise TypeError(
            "past_key_values is a tuple of tensors; pass a transformers DynamicCache or StaticCache."
        )


def check_positions(input_ids: Tensor, found: Tensor | None) -> None:
    """Refuse position_ids of another shape."""
    length = input_ids.shape[1]
    if found is not None and tuple(found.shape) not in ((len(input_ids), length), (1, length)):
        raise ValueError(
            f"position_ids has shape {list(found.shape)}, input_ids {list(input_ids.shape)}; they must agree."
        )


def check_room(needed: int, num_slots: int) -> None:
    """Refuse more tokens than a static cache holds."""
    if needed > num_slots:
        raise ValueError(
            f"past_key_values is a static cache of {num_slots} tokens, {needed} are needed; make it longer."
        )


def _past_of_static(cache: Any, attention_mask: Tensor | None, length: int) -> int:
    """Tokens in a static cache: by the mask, whose padding leaves entries of zeros that the cache does not count."""
    if attention_mask is None:
        return int(cache.get_seq_length())
    return attention_mask.shape[1] - length


class EVEDecodingMixin:
    """`prepare_inputs_for_generation`, for a class with `forward` as EVEQwen2ForCausalLM."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        token_kinds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_logits_to_keep: int | None = None,
        cache_position: Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet, their kinds, positions and patches; new tokens are text.

        transformers 4 passes cache_position, 5 next_sequence_length and is_first_iteration. The mask has a column for
        each token so far, so it says with the number of new ones how many came before."""
        refuse_tuple(past_key_values)
        if use_cache is False:  # transformers 4.44 makes one all the same
            past_key_values = None
        total = (input_ids if attention_mask is None else attention_mask).shape[1]
        past = _num_past(past_key_values, total, cache_position, next_sequence_length)
        if past == 0 and attention_mask is not None:
            refuse_right_padding(attention_mask)
        inputs = {
            "input_ids": input_ids[:, max(input_ids.shape[1] - (total - past), 0) :],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "logits_to_keep": logits_to_keep,
        }
        if num_logits_to_keep is not None:  # until transformers 4.49
            inputs["num_logits_to_keep"] = num_logits_to_keep
        if position_ids is not None and not is_plain_count(position_ids, cache_position):
            inputs["position_ids"] = continued(position_ids, total)[:, past:total]
        num_slots = slots_of(past_key_values)
        if num_slots is not None:
            inputs |= _of_static_cache(inputs, past=past, total=total, num_slots=num_slots)
        return inputs | _vision_inputs(token_kinds, pixel_values, past=past, total=total)


def _num_past(
    cache: Any, total: int, cache_position: Tensor | None, next_sequence_length: int | None
) -> int:
    """Tokens that the cache holds."""
    if cache is None:
        return 0
    if cache_position is not None:
        return total - cache_position.shape[0]
    if next_sequence_length is not None:
        return total - next_sequence_length
    return int(cache.get_seq_length())


def refuse_right_padding(attention_mask: Tensor) -> None:
    """`generate` reads the answer's first token from the last position, whatever stands there.

    A row of padding alone is the beginning of a prompt that goes in by chunks."""
    if bool(((attention_mask[:, -1] == 0) & attention_mask.any(1)).any()):
        raise ValueError(
            "generate() continues prompts at their last position, but attention_mask is 0 there: pad on the left "
            '(processor(..., padding_side="left")).'
        )


def is_plain_count(position_ids: Tensor, cache_position: Tensor | None) -> bool:
    """Whether these are the columns' numbers, padding counted, as transformers 4 passes them with chunks of a prompt.

    The mask's count is the same but for padding, which the steps after the prompt do not count either."""
    if cache_position is None or position_ids.shape != (1, cache_position.shape[0]):
        return False
    return bool((position_ids[0] == cache_position).all())


def continued(position_ids: Tensor, total: int) -> Tensor:
    """Positions of a prompt, and of the tokens after it."""
    missing = total - position_ids.shape[1]
    if missing <= 0:
        return position_ids
    steps = torch.arange(1, missing + 1, device=position_ids.device)
    return torch.cat((position_ids, position_ids[:, -1:] + steps), dim=1)


def _of_static_cache(
    inputs: dict[str, Any], *, past: int, total: int, num_slots: int
) -> dict[str, Any]:
    """Places, positions and mask of the same shape at every step: a compiled forward is not compiled again."""
    check_room(total, num_slots)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = inputs.get("position_ids")
    return {
        "cache_position": torch.arange(past, total, device=ids.device),
        "position_ids": _positions(ids, mask, past) if positions is None else positions,
        "attention_mask": None if mask is None else F.pad(mask, (0, num_slots - total)),
    }


def _vision_inputs(
    token_kinds: Tensor | None, pixel_values: Tensor | None, *, past: int, total: int
) -> dict[str, Any]:
    """Kinds and patches of the tokens from `past` on; none where all of these are text."""
    if token_kinds is None:
        return (
            {} if pixel_values is None else {"pixel_values": pixel_values}
        )  # which forward refuses
    if past >= token_kinds.shape[1]:
        return {}
    num_new = max(total - token_kinds.shape[1], 0)
    inputs = {"token_kinds": F.pad(token_kinds, (0, num_new), value=TEXT)[:, past:total]}
    if pixel_values is not None:
        before = (token_kinds[:, :past] == PATCH).sum(1).tolist()
        through = (token_kinds[:, :total] == PATCH).sum(1).tolist()
        rows = [
            row[start:end] for row, start, end in zip(pixel_values, before, through, strict=True)
        ]
        inputs["pixel_values"] = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return inputs


__all__ = ["EVEDecodingMixin", "TokenPlaces", "continued", "refuse_right_padding"]
