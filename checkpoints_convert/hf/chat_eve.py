# SPDX-License-Identifier: Apache-2.0
"""A conversation with a released model, one question at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image

History = list[tuple[str, str]]
"""(question, answer) of the turns so far."""


class EVEChatMixin:
    """`model.chat`, for a class that has `generate` and `device`."""

    def chat(
        self,
        processor: Any,
        question: str,
        *,
        images: "Image.Image | Sequence[Image.Image]" = (),
        history: History | None = None,
        resize_rule: str | None = None,
        **generate_options: Any,
    ) -> tuple[str, History]:
        """The answer, and the history with this turn at its end (the given one is not changed).

        Args:
            processor: the folder's EVEProcessor.
            images: of the whole conversation, every time; they stand before its first question.
            resize_rule: `train` or `eval`; None: the processor's.
            generate_options: for `generate`, such as max_new_tokens.
        """
        given = [images] if hasattr(images, "convert") else list(images)
        turns = list(history or [])
        prompt = processor.conversation([*turns, (question, None)], num_images=len(given))
        inputs = processor(text=prompt, images=given, resize_rule=resize_rule)
        with torch.inference_mode():
            output = self.generate(**inputs.to(self.device), **generate_options)  # type: ignore[attr-defined]
        answer = processor.answers(output, prompt_length=inputs["input_ids"].shape[1])[0]
        return answer, [*turns, (question, answer)]


__all__ = ["EVEChatMixin"]
