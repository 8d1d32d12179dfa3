# SPDX-License-Identifier: Apache-2.0
"""From text and PIL images to the model's input, as in training: resize, normalise, cut into patches, expand marks.

Two resize rules, both official (baaivision/EVE, EVEv2: train/train.py and mm_utils.py), which differ on purpose of
nobody: `train` caps the area at `max_size` squared, rounds edges half to even to a multiple of 32 and never
enlarges; `eval` always scales to that area and rounds up. A model sees in training what `train` gives, so `train`
is the default; `eval` is what the official benchmarks used.

An image becomes CLS, then row by row its patches and an SPL. Every `<image>` mark of the text is replaced by these
tokens. Batches are padded where the tokenizer says, in a release on the left, so that `generate` continues each prompt.
Keywords that are not named here are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from .batch_eve import (
    IMAGE_MARK,
    Lengths,
    PaddingSide,
    PromptTokens,
    assign_images,
    collated,
    texts_of,
)
from .modality_eve import CLS, PATCH, SPL, TEXT
from .pixels_eve import resized, rgb_pixels, turn_of, turned

ResizeRule = Literal["train", "eval"]
Template = Literal["qwen2", "plain"]

SYSTEM_TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
STOP_TEXT = "<|im_end|>"
FIXED = {
    "do_resize": False,  # by transformers; `resize_rule` and `max_size` say how it is done here
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
"""Fields that image processors have, and the only value of each that this one computes."""
_BOOKKEEPING = (
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "name_or_path",
)
"""Fields that transformers writes and reads for itself."""
FILLER_TOKENS = ("<|image_pad|>", "<|im_start|>")
"""What `input_ids` holds at vision tokens: the first of these that the tokenizer has, else the end token. The model
does not read it, but a repetition penalty counts every id of the prompt: neither of these is ever generated, the end
token is."""


@dataclass(frozen=True)
class ImageTokens:
    """One image as the model reads it."""

    patches: np.ndarray  # [P, dense_stride ** 2, 3 * patch_stride ** 2] float32, reading order
    kinds: np.ndarray  # [P + rows + 1] int64: CLS, then PATCH .. PATCH SPL of each row


def target_size(
    width: int, height: int, *, max_size: int, edge: int, rule: ResizeRule
) -> tuple[int, int]:
    """(width, height) after resizing; both multiples of `edge`."""
    ratio = sqrt(width * height) / max_size
    if rule == "eval":
        return ceil(width / ratio / edge) * edge, ceil(height / ratio / edge) * edge
    ratio = max(ratio, 1.0)
    return (
        max(round(width / ratio / edge), 1) * edge,
        max(round(height / ratio / edge), 1) * edge,
    )


def cut_patches(pixels_HWC: np.ndarray, *, patch_stride: int, dense_stride: int) -> np.ndarray:
    """[H, W, 3] -> [rows * cols, dense_stride ** 2, 3 * patch_stride ** 2] in reading order."""
    height, width, _ = pixels_HWC.shape
    edge = patch_stride * dense_stride
    grid = pixels_HWC.reshape(
        height // edge, dense_stride, patch_stride, width // edge, dense_stride, patch_stride, 3
    )
    patches = grid.transpose(0, 3, 1, 4, 6, 2, 5)  # rows, cols, dy, dx, colour, y, x
    return np.ascontiguousarray(patches).reshape(-1, dense_stride**2, 3 * patch_stride**2)


class EVEImageProcessor(BaseImageProcessor):
    """One image -> normalised patches. The field names in preprocessor_config.json are the official ones."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        max_size: int = 800,
        patch_stride: int = 16,
        dense_stride: int = 2,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        resize_rule: ResizeRule = "train",
        exif_rotation: bool = True,
        **kwargs: Any,
    ) -> None:
        known = {*FIXED, *_BOOKKEEPING}
        if unknown := sorted(n for n in kwargs if n not in known and not n.startswith("_")):
            raise TypeError(
                f"EVEImageProcessor has no field {', '.join(unknown)}; take it out of preprocessor_config.json."
            )
        super().__init__(**kwargs)
        self.max_size = max_size
        self.patch_stride = patch_stride
        self.dense_stride = dense_stride
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.resize_rule = check_resize_rule(resize_rule)
        if not isinstance(exif_rotation, bool):
            raise ValueError(f"exif_rotation={exif_rotation!r} is unknown; use true or false.")
        self.exif_rotation = exif_rotation
        self.check_fixed()

    def check_fixed(self) -> None:
        """Refuse other values of fields that are understood but not computed, whoever set them."""
        for name, value in FIXED.items():
            if (found := getattr(self, name, value)) != value:
                raise ValueError(
                    f"{name}={found!r} is not computed here; leave it at {value!r} (images are resized by resize_rule "
                    "and max_size, and normalised by image_mean and image_std)."
                )

    def resize(self, image: Image.Image, *, rule: ResizeRule | None = None) -> Image.Image:
        """RGB, turned as in training, and of the size that the rule gives (aspect ratio kept to within a token)."""
        turn = turn_of(image, exif_rotation=self.exif_rotation)
        upright = turned(rgb_pixels(image), turn)
        width, height = target_size(
            *upright.size,
            max_size=self.max_size,
            edge=self.patch_stride * self.dense_stride,
            rule=check_resize_rule(rule or self.resize_rule),
        )
        return resized(upright, size=(height, width))

    def image_tokens(self, image: Image.Image, *, rule: ResizeRule | None = None) -> ImageTokens:
        """Resize, normalise and cut one image."""
        self.check_fixed()
        resized = self.resize(image, rule=rule)
        edge = self.patch_stride * self.dense_stride
        cols, rows = resized.width // edge, resized.height // edge
        pixels = np.asarray(resized, dtype=np.float32) / 255
        mean = np.asarray(self.image_mean, dtype=np.float32)
        std = np.asarray(self.image_std, dtype=np.float32)
        patches = cut_patches(
            (pixels - mean) / std, patch_stride=self.patch_stride, dense_stride=self.dense_stride
        )
        row = np.asarray([PATCH] * cols + [SPL], dtype=np.int64)
        return ImageTokens(patches, np.concatenate(([CLS], np.tile(row, rows))))

    def preprocess(  # type: ignore[override]
        self,
        images: Image.Image | Sequence[Image.Image],
        resize_rule: ResizeRule | None = None,
    ) -> BatchFeature:
        """`pixel_values` and `token_kinds`: one numpy array for each image (sizes differ, so no tensor)."""
        found = [images] if isinstance(images, Image.Image) else list(images)
        tokens = [self.image_tokens(image, rule=resize_rule) for image in found]
        return BatchFeature(
            {
                "pixel_values": [image.patches for image in tokens],
                "token_kinds": [image.kinds for image in tokens],
            }
        )


class EVEProcessor(ProcessorMixin):
    """Prompt building, tokenisation and image preparation in one call."""

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 (declared so upstream)
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"  # type: ignore[assignment]
    image_processor: EVEImageProcessor
    tokenizer: Any  # a tokenizer of transformers
    chat_template: str | None

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
    ) -> None:
        """`chat_template`: None takes the tokenizer's, where a release keeps it: every version of transformers looks
        there."""
        chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "token_kinds", "pixel_values"]

    @property
    def template(self) -> Template:
        """How this model is asked: `qwen2`, or `plain` if it was trained on captions alone and has no chat template."""
        return "qwen2" if self.chat_template else "plain"

    def prompt(
        self, question: str, *, num_images: int = 1, template: Template | None = None
    ) -> str:
        """The text that training put before an answer (`qwen2`) or a caption (`plain`, which has no question).

        `template`: None is this model's own."""
        if (template or self.template) == "plain":
            if question:
                raise ValueError(
                    f"The plain template has no place for a question, found {question!r}; pass an empty one or use "
                    'template="qwen2".'
                )
            return IMAGE_MARK * num_images
        return self.conversation([(question, None)], num_images=num_images)

    def conversation(self, turns: Sequence[tuple[str, str | None]], *, num_images: int = 1) -> str:
        """(question, answer) turns in the qwen2 template, images in the first; the last answer may be None."""
        if self.template == "plain":
            raise ValueError(
                "This model was trained on captions alone (template plain) and holds no conversation; use "
                'prompt("", template="plain").'
            )
        text = SYSTEM_TEXT + " "
        for index, (question, answer) in enumerate(turns):
            marks = f"{IMAGE_MARK}\n" * num_images if index == 0 else ""
            text += f"USER: {marks}{question.strip()} ASSISTANT:"
            if answer is not None:
                text += f" {answer}{STOP_TEXT}"
        return text

    def __call__(  # type: ignore[override]
        self,
        text: str | Sequence[str],
        images: Any = None,
        resize_rule: ResizeRule | None = None,
        return_tensors: Literal["pt"] = "pt",
        videos: None = None,
        audio: None = None,
        padding: bool | str | None = True,
        padding_side: PaddingSide | None = None,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        add_special_tokens: bool = False,
    ) -> BatchFeature:
        """The model's input for one prompt or a batch of prompts.

        Args:
            text: prompts, with one `<image>` mark for each image.
            images: in the order of the marks; flat, or one list for each prompt. PIL images, or uint8 arrays.
            resize_rule: `train` or `eval`; None: the one in preprocessor_config.json.
            padding: True (to the longest), `max_length`, or False (prompts of one length).
            padding_side: None: the tokenizer's, `left` in a release, which is the side for `generate`.
            truncation: cut the text of longer prompts to max_length on the tokenizer's truncation_side; never an image.
            max_length: None: the tokenizer's model_max_length.
            add_special_tokens: training added none, so neither is any here.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt'.")
        if videos is not None or audio is not None:  # apply_chat_template passes them, mostly None
            raise ValueError("This model reads text and images only.")
        if add_special_tokens:
            raise ValueError("add_special_tokens=True is not supported: training added none.")
        lengths = Lengths.of(
            self.tokenizer,
            padding=padding,
            padding_side=padding_side,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        texts = texts_of(text)
        groups = assign_images(texts, images)
        prepared = [
            [self.image_processor.image_tokens(image, rule=resize_rule) for image in group]
            for group in groups
        ]
        return self.collate(self.expand(texts, prepared), lengths)

    def expand(
        self, texts: Sequence[str], images: Sequence[Sequence[ImageTokens]]
    ) -> list[PromptTokens]:
        """Token ids, kinds and patches of prompts whose images are already `image_tokens`, unpadded.

        Each piece of text between marks is tokenised by itself, as in training."""
        pieces = [text.split(IMAGE_MARK) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"])
        filler = self.filler_id
        shape = (
            self.image_processor.dense_stride**2,
            3 * self.image_processor.patch_stride**2,
        )
        no_patches = np.zeros((0, *shape), dtype=np.float32)
        prompts = []
        for of_text, of_images in zip(pieces, images, strict=True):
            ids, kinds = list(next(encoded)), []
            kinds += [TEXT] * len(ids)
            for _, image in zip(of_text[1:], of_images, strict=True):
                after = next(encoded)
                ids += [filler] * len(image.kinds) + after
                kinds += image.kinds.tolist() + [TEXT] * len(after)
            patches = np.concatenate([no_patches, *(image.patches for image in of_images)])
            prompts.append(
                PromptTokens(np.asarray(ids, np.int64), np.asarray(kinds, np.int64), patches)
            )
        return prompts

    def collate(
        self, prompts: Sequence[PromptTokens], lengths: Lengths | None = None
    ) -> BatchFeature:
        """Expanded prompts -> padded tensors: tokens on the left unless `lengths` says else, patches at the end."""
        return BatchFeature(collated(prompts, lengths or Lengths(), pad_id=self.pad_id))

    @property
    def filler_id(self) -> int:
        """What `input_ids` holds at vision tokens."""
        for token in FILLER_TOKENS:
            found = self.tokenizer.convert_tokens_to_ids(token)
            if found is not None and found != self.tokenizer.unk_token_id:
                return found
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """What `input_ids` holds at padding."""
        if self.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad_token; set it in tokenizer_config.json.")
        return self.tokenizer.pad_token_id

    def answers(
        self, output_ids: torch.Tensor, *, prompt_length: int, template: Template | None = None
    ) -> list[str]:
        """Texts that `generate` appended to prompts of (padded) length `prompt_length`.

        Captions of template `plain` end with their line: no token ends them. None: this model's own template."""
        texts = self.tokenizer.batch_decode(output_ids[:, prompt_length:], skip_special_tokens=True)
        if (template or self.template) == "plain":
            texts = [text.lstrip().split("\n")[0] for text in texts]
        return [text.strip() for text in texts]


def check_resize_rule(rule: ResizeRule) -> ResizeRule:
    """Refuse anything but the two official rules."""
    if rule not in ("train", "eval"):
        raise ValueError(f"resize_rule={rule!r} is unknown; use 'train' or 'eval'.")
    return rule


__all__ = ["EVEImageProcessor", "EVEProcessor", "PromptTokens"]
