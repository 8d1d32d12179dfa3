# SPDX-License-Identifier: Apache-2.0
"""Does the official EVEv2 code give a release's logits? In two steps, as the two need different transformers.

    python -m tools.official_logits record releases/eve-7b logits.safetensors
    python -m tools.official_logits compare releases/eve-7b logits.safetensors --checkout EVE/EVEv2

`record` puts fixed questions about drawn pictures to the release's own files, in this project's environment. `compare`
loads the same folder with the classes of a checkout of baaivision/EVE, in an environment of its requirements
(transformers 4.43 to 4.48), started in this project's root; of this project it imports nothing. It gives them the same
ids and pixels, in float32, and names each tensor that is missing, left over or of another shape. Exit codes: 0 the
same, 1 not the same or not loadable, 2 wrong usage."""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors

IMAGE_ID = -200
"""What the official code takes for an image in the ids."""
SIZES = ((96, 64), (200, 150), (33, 97))  # width, height
QUESTION = "What is in the image? Describe it in one sentence."


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two steps and return its exit code."""
    arguments = _parse(argv)
    return int(arguments.command(arguments))


def record(arguments: argparse.Namespace) -> int:
    """Ids, pixels and logits of each question into a safetensors file."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoProcessor

    auto_processor: Any = AutoProcessor  # untyped upstream
    auto_model: Any = AutoModelForCausalLM
    options = {"trust_remote_code": True, "local_files_only": True}
    processor = auto_processor.from_pretrained(arguments.release, **options)
    model = auto_model.from_pretrained(arguments.release, dtype=torch.float32, **options)
    tensors = {}
    for number, (images, rule) in enumerate(_questions()):
        text = processor.prompt(QUESTION, num_images=len(images))
        inputs = processor(text=text, images=images, resize_rule=rule)
        with torch.inference_mode():
            tensors[f"{number}.logits"] = model(**inputs).logits[0].clone()
        pieces = [processor.tokenizer.encode(piece) for piece in text.split("<image>")]
        ids = pieces[0] + [token for piece in pieces[1:] for token in (IMAGE_ID, *piece)]
        tensors[f"{number}.ids"] = torch.tensor(ids)
        for place, image in enumerate(images):
            tensors[f"{number}.image{place}"] = _pixels(processor.image_processor, image, rule)
    save_file(tensors, arguments.file)
    print(f"wrote the logits of {number + 1} questions to {arguments.file}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """The official classes on what `record` wrote."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(arguments.file)
    model = _official_model(arguments.release.resolve(), arguments.checkout.resolve())
    if model is None:
        return 1
    worst = 0.0
    for number in range(sum(name.endswith(".ids") for name in stored)):
        own = stored[f"{number}.logits"]
        names = sorted(name for name in stored if name.startswith(f"{number}.image"))
        ids = stored[f"{number}.ids"][None].clone()  # the official code writes into it
        with torch.no_grad():
            images = [stored[name] for name in names] or None
            found = model(input_ids=ids, images=images).logits[0].float()
        if found.shape != own.shape:
            print(f"question {number}: logits {list(found.shape)}, ours {list(own.shape)}")
            return 1
        gap, largest = float((found - own).abs().max()), float(own.abs().max())
        worst = max(worst, gap / largest)
        print(
            f"question {number}: {len(names)} images, {len(own)} tokens, largest logit {largest:.3g}, differ by "
            f"{gap:.3g} at most, {gap / largest:.3g} of it"
        )
    same = worst <= arguments.tolerance
    print(
        f"{'within' if same else 'beyond'} the limit {arguments.tolerance:g} of the largest logit"
    )
    return 0 if same else 1


def _official_model(release: Path, checkout: Path) -> Any:
    """None if the release does not fit the official classes; they name an image processor relative to where one is."""
    import json

    import torch

    sys.path.insert(0, str(checkout))
    # By name: the checkout is no package that this project could depend on.
    module = importlib.import_module("eve.model.language_model.eve_qwen2")
    tower = json.loads((release / "config.json").read_text())["mm_vision_tower"]
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / tower
        link.parent.mkdir(parents=True)
        link.symlink_to(release)
        before = Path.cwd()
        os.chdir(folder)
        try:
            model, report = module.EVEQwen2ForCausalLM.from_pretrained(
                str(release), torch_dtype=torch.float32, output_loading_info=True
            )
        finally:
            os.chdir(before)
    problems = {kind: names for kind, names in report.items() if names}
    for kind, names in problems.items():
        print(f"{kind}: {', '.join(map(str, names))}")
    return None if problems else model.eval()


def _questions() -> Iterator[tuple[list[Any], str]]:
    """(pictures, resize rule): each picture by both rules, two together, none."""
    import numpy as np
    from PIL import Image

    def drawn(width: int, height: int) -> Any:
        rows, cols = np.mgrid[0:height, 0:width]
        colours = np.stack((rows * 2, cols * 2 - 1, rows * cols), axis=-1) % 256
        return Image.fromarray(colours.astype(np.uint8))

    pictures = [drawn(*size) for size in SIZES]
    for rule in ("train", "eval"):
        yield from (([picture], rule) for picture in pictures)
    yield pictures[:2], "train"
    yield [], "train"


def _pixels(image_processor: Any, image: Any, rule: str) -> Any:
    """[3, H, W] float32, resized and normalised as the processor does before it cuts patches."""
    import numpy as np
    import torch

    pixels = np.asarray(image_processor.resize(image, rule=rule), dtype=np.float32) / 255
    mean = np.asarray(image_processor.image_mean, dtype=np.float32)
    std = np.asarray(image_processor.image_std, dtype=np.float32)
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.official_logits",
        description="Compare a release's logits with those of the official EVEv2 code.",
        epilog="example: python -m tools.official_logits record releases/eve-7b logits.safetensors",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, summary in (
        (record, "logits of the release's own files, in this project's environment"),
        (compare, "the official classes on the same input, in an environment of theirs"),
    ):
        command = commands.add_parser(function.__name__, help=summary, description=summary)
        command.set_defaults(command=function)
        command.add_argument("release", type=Path, help="released Hugging Face folder")
        command.add_argument("file", type=Path, help="ids, pixels and logits of the questions")
    command.add_argument("--checkout", type=Path, required=True, help="EVEv2 of baaivision/EVE")
    command.add_argument(
        "--tolerance", type=float, default=1e-5, help="of the largest logit (default 1e-5)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    end_with(main)
