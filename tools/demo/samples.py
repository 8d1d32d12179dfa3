# SPDX-License-Identifier: Apache-2.0
"""A few test images with questions and the model's answers, to look at: samples.md and samples.png.

    python -m tools.demo.samples runs/demo runs/demo/data/easy-vqa

Reads answers.jsonl of the first folder. The images are spread evenly over the test split, not chosen by their answers;
of each the first question of every type is shown."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import DataError
from megatron_eve.evaluation.easy_vqa import ANSWERS_FILE
from megatron_eve.evaluation.scoring import Answered, normalised

NUM_IMAGES = 12
COLUMNS = 4


def read_answers(folder: Path) -> list[Answered]:
    """The answers that evaluate.py wrote."""
    path = folder / ANSWERS_FILE
    if not path.is_file():
        raise DataError(
            f"{path} is missing; make it with `python -m megatron_eve.evaluation.easy_vqa`."
        )
    with path.open(encoding="utf-8") as file:
        return [Answered(**json.loads(line)) for line in file]


def choose(answered: Sequence[Answered], *, num_images: int) -> dict[str, list[Answered]]:
    """Image -> its first question of each type, for images at equal distances."""
    by_image: dict[str, list[Answered]] = {}
    for one in answered:
        shown = by_image.setdefault(one.image, [])
        if one.type not in {other.type for other in shown}:
            shown.append(one)
    names = list(by_image)
    count = min(num_images, len(names))
    return {name: by_image[name] for name in (names[n * len(names) // count] for n in range(count))}


def markdown(chosen: dict[str, list[Answered]], *, easy_vqa: Path, folder: Path) -> str:
    """A table with one line a question."""
    lines = [
        "# Sample answers",
        "",
        "Test images at equal distances, not chosen by their answers.",
        "",
        "![samples](samples.png)",
        "",
        "| image | question | expected | right image | wrong image |",
        "|---|---|---|---|---|",
    ]
    for image, questions in chosen.items():
        path = (easy_vqa / image).resolve()
        inside = path.is_relative_to(folder.resolve())
        link = path.relative_to(folder.resolve()) if inside else path
        for one in questions:
            mark = "" if normalised(one.answer) == normalised(one.expected) else " (wrong)"
            lines.append(
                f"| [{image}]({link}) | {one.question} | {one.expected} | {one.answer}{mark} | "
                f"{one.answer_wrong_image} |"
            )
    return "\n".join(lines) + "\n"


def draw(chosen: dict[str, list[Answered]], *, easy_vqa: Path, out: Path) -> None:
    """A contact sheet; wrong answers are red."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    rows = -(-len(chosen) // COLUMNS)
    figure, axes = pyplot.subplots(
        rows, COLUMNS, figsize=(3.4 * COLUMNS, 3.3 * rows), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, questions) in zip(axes.flat, chosen.items(), strict=False):
        with Image.open(easy_vqa / image) as picture:
            axis.imshow(picture.convert("RGB"))
        for line, one in enumerate(questions):
            is_right = normalised(one.answer) == normalised(one.expected)
            axis.text(
                0.5,
                -0.08 - 0.18 * line,
                f"{one.question}\n{one.answer}" + ("" if is_right else f" (is: {one.expected})"),
                transform=axis.transAxes,
                horizontalalignment="center",
                verticalalignment="top",
                fontsize=8,
                color="black" if is_right else "crimson",
                parse_math=False,
            )
    figure.subplots_adjust(hspace=0.75, top=0.98, bottom=0.16)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 1 the answers or images are missing, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo.samples",
        description="Write samples.md and samples.png beside the answers of an evaluation.",
        epilog="example: python -m tools.demo.samples runs/demo runs/demo/data/easy-vqa",
    )
    parser.add_argument("folder", type=Path, help="folder with answers.jsonl; samples are replaced")
    parser.add_argument("easy_vqa", type=Path, help="folder of `python -m data_prep demo easy-vqa`")
    arguments = parser.parse_args(argv)
    folder, easy_vqa = arguments.folder, arguments.easy_vqa
    chosen = choose(read_answers(folder), num_images=NUM_IMAGES)
    draw(chosen, easy_vqa=easy_vqa, out=folder / "samples.png")
    (folder / "samples.md").write_text(markdown(chosen, easy_vqa=easy_vqa, folder=folder))
    print(f"wrote samples.md and samples.png with {len(chosen)} images to {folder}")
    return 0


if __name__ == "__main__":
    end_with(main)
