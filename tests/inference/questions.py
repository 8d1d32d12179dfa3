# SPDX-License-Identifier: Apache-2.0
"""Pictures as bytes, prompts of every shape, and the same prompts for the plain reference."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_eve.data.read.conversation import encode_prompt
from megatron_eve.data.sample import Turn
from megatron_eve.inference.engine import Engine
from megatron_eve.inference.prompts import ChatTurn
from megatron_eve.inference.ragged import Prompt
from megatron_eve.model.patch_embedding import CLIP_MEAN, CLIP_STD
from tests.support.reference_eve import ReferenceEve, ReferenceSample

SIZES = ((8, 8), (16, 4), (12, 8))
"""(width, height) of the pictures: small enough, and whole tokens, so that the rule of training leaves them alone."""

CONVERSATIONS: tuple[tuple[str, tuple[tuple[str, str], ...], tuple[int, ...]], ...] = (
    ("qwen2", (("human", "<image>\nWhat colour is the circle?"),), (0,)),
    ("qwen2", (("human", "How many shapes are there?"),), ()),
    ("plain", (("human", "<image><image>"),), (1, 2)),
    ("qwen2", (("human", "<image>\n<image>\nred or blue"),), (2, 0)),
    (
        "qwen2",
        (("human", "<image>\nfirst"), ("gpt", "red"), ("human", "<image>\nsecond")),
        (1, 0),
    ),
)
"""Template, turns and pictures: an image first, text alone, images alone, two in a turn, two turns."""


def picture(index: int) -> np.ndarray:
    """[H, W, 3] uint8 noise."""
    width, height = SIZES[index]
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """The encoded file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def prompts(engine: Engine) -> list[Prompt]:
    """CONVERSATIONS by the engine's own way in."""
    found = []
    for template, turns, pictures in CONVERSATIONS:
        queue = iter([engine.image(png(picture(index))) for index in pictures])
        chat = []
        for role, text in turns:
            images = tuple(next(queue) for _ in range(text.count("<image>")))
            spoken = text.replace("<image>\n", "").replace("<image>", "")
            chat.append(ChatTurn("user" if role == "human" else "assistant", spoken, images))
        found.append(engine.prompt(chat, template=template))  # type: ignore[arg-type]
    return found


def reference_samples(engine: Engine) -> list[ReferenceSample]:
    """CONVERSATIONS as placeholders and normalised pixels, without patches or kinds."""
    samples = []
    for template, turns, pictures in CONVERSATIONS:
        ids = encode_prompt(
            [Turn(role, text) for role, text in turns],
            num_images=len(pictures),
            template=template,  # type: ignore[arg-type]
            tokenizer=engine.tokenizer,
        )
        images = tuple(normalised(picture(index)) for index in pictures)
        samples.append(ReferenceSample(ids=torch.from_numpy(ids), images=images))
    return samples


def normalised(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 -> [3, H, W] float32."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std


@torch.no_grad()
def reference_next(eve: ReferenceEve, sample: ReferenceSample, answer: list[int]) -> Tensor:
    """Logits [vocabulary] after the prompt and `answer`, by a full forward without a cache."""
    ids = torch.cat((sample.ids, torch.tensor(answer, dtype=torch.int64)))
    logits: Tensor = eve(ReferenceSample(ids=ids, images=sample.images)).logits[-1]
    return logits
