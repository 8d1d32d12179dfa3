# SPDX-License-Identifier: Apache-2.0
"""From a conversation and encoded images to a prompt, by the code that makes training samples.

So a prompt is the training sample up to the answer: same template, same tokens, same resize (the official rule of
training, or of evaluation, by choice). Refused as DataError: an image that cannot be decoded or has more pixels than
allowed, text that spells a token that ends a text or an `<image>` mark, a question without text and images, turns that
do not alternate.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.config.schema import ModelConfig, TemplateName
from megatron_eve.data.assemble import expand
from megatron_eve.data.read.conversation import EncodedSample, encode_prompt
from megatron_eve.data.read.image_size import MAX_IMAGE_PIXELS, eval_size, train_size
from megatron_eve.data.read.media_names import IMAGE_MARK
from megatron_eve.data.read.patches import patchify
from megatron_eve.data.read.pixels import resized, rgb_pixels, turn_of, turned, turned_size
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Turn
from megatron_eve.errors import DataError
from megatron_eve.inference.ragged import Prompt
from megatron_eve.inference.release import ImageRules, ResizeRule

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
"""Formats that are decoded. Pillow opens more, but it runs Ghostscript on EPS, and an icon file's header does not give
the size of the image inside."""

STOPS: dict[TemplateName, tuple[str, ...]] = {"qwen2": (), "plain": ("\n",)}
"""Texts that end an answer beside the release's end tokens: a caption ends with its line."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image, resized and cut."""

    patches: NDArray[np.uint8]  # [rows * cols, d*d, 3*p*p]
    rows: int
    cols: int

    @property
    def num_tokens(self) -> int:
        """CLS, patches, one SPL for each row."""
        return self.rows * self.cols + self.rows + 1


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One side's turn. Images of a user's turn come in front of its text, as in training."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[PreparedImage, ...] = ()


def prepare_image(
    data: bytes,
    *,
    model: ModelConfig,
    rules: ImageRules,
    resize_rule: ResizeRule | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> PreparedImage:
    """Decode, turn, resize and cut encoded bytes (JPEG, PNG, WebP, ...), by the code that makes training's pixels.

    The size is read from the header before any pixel is decoded. Raises DataError."""
    _check_pixels(data, max_pixels=max_pixels)
    rule = eval_size if (resize_rule or rules.resize_rule) == "eval" else train_size
    edge = model.pixels_per_token
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            turn = turn_of(image, exif_rotation=rules.exif_rotation)
            size = rule(*turned_size(image, turn), edge=rules.edge, pixels_per_token=edge)
            pixels = np.array(resized(turned(rgb_pixels(image), turn), size=size))
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
        raise DataError(
            f"the image cannot be decoded ({type(error).__name__}: {str(error)[:200]}); send a whole file."
        ) from error
    patches = patchify(pixels, patch_stride=model.patch_stride, dense_stride=model.dense_stride)
    return PreparedImage(patches, size[0] // edge, size[1] // edge)


def _check_pixels(data: bytes, *, max_pixels: int) -> None:
    """From the header alone, before anything is decoded (to look for EXIF, Pillow decodes a whole PNG)."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"the image is too large ({error}); send a smaller one.") from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged headers
        raise DataError(
            f"the image cannot be decoded ({len(data):,} bytes of no known format); send a JPEG, PNG or WebP file."
        ) from error
    if width * height > max_pixels:
        raise DataError(
            f"the image is {width} x {height} pixels, the limit is {max_pixels:,} in all; send a smaller one."
        )


def build_prompt(
    turns: Sequence[ChatTurn],
    *,
    template: TemplateName,
    tokenizer: Tokenizer,
    model: ModelConfig,
) -> Prompt:
    """The prompt whose continuation is the assistant's next turn.

    `plain` (stages 1 and 2.1): images and nothing else, one user turn without text. Raises DataError."""
    if template == "plain" and (len(turns) != 1 or turns[0].text or not turns[0].images):
        raise DataError(
            "template plain writes a caption: it takes images and no text; use template qwen2 to ask."
        )
    for number, turn in enumerate(turns):
        if IMAGE_MARK in turn.text:
            raise DataError(
                f"turn {number} spells {IMAGE_MARK}, which stands for an image in the template; leave it out and give "
                "images as images."
            )
        if turn.role == "assistant" and turn.images:
            raise DataError(f"turn {number}, the assistant's, has an image; only the user's may.")
        if turn.role == "user" and not turn.text.strip() and not turn.images:
            raise DataError(f"turn {number} is empty; give a question, an image, or both.")
        if not _is_unicode(turn.text):
            raise DataError(
                f"turn {number} holds half of a surrogate pair, which is no text; send it as UTF-8."
            )
    images = [image for turn in turns for image in turn.images]
    ids = encode_prompt(
        [_turn(turn) for turn in turns],
        num_images=len(images),
        template=template,
        tokenizer=tokenizer,
    )
    grids = [(image.rows, image.cols) for image in images]
    tokens = expand(EncodedSample(ids=ids, labels=ids, was_cut=False), grids=grids)
    shape = (0, model.dense_stride**2, 3 * model.patch_stride**2)
    patches = [np.empty(shape, np.uint8), *(image.patches for image in images)]
    return Prompt(np.maximum(tokens.ids, 0), tokens.kinds, np.concatenate(patches))


def _is_unicode(text: str) -> bool:
    """JSON and command lines can hold lone surrogates, tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _turn(turn: ChatTurn) -> Turn:
    if turn.role == "assistant":
        return Turn("gpt", turn.text)
    return Turn("human", f"{IMAGE_MARK}\n" * len(turn.images) + turn.text.strip())
