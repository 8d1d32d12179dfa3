# SPDX-License-Identifier: Apache-2.0
"""Ask a released model about images: python -m megatron_eve.inference.generate FOLDER --image X --prompt Y

Greedy, on a GPU if there is one. The answer is the last line of output. Exit codes: 0 done, 1 the folder or an image
is bad, 2 wrong usage.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eve.errors import EveError


def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.template == "plain" and arguments.prompt:
        parser.error("--template plain writes a caption and takes no --prompt")
    if arguments.template == "plain" and not arguments.image:
        parser.error("--template plain needs at least one --image")
    if arguments.template == "qwen2" and not arguments.prompt:
        parser.error("--prompt is missing (or use --template plain for a caption)")
    try:
        print(_answer(arguments))
    except EveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _answer(arguments: argparse.Namespace) -> str:
    from megatron_eve.inference.answers import (  # seconds to import: not for --help
        AnswerOptions,
        Question,
        answer_questions,
        load_released,
    )

    options = AnswerOptions(
        template=arguments.template,
        resize_rule=arguments.resize_rule,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=1,
    )
    question = Question(text=arguments.prompt, images=tuple(arguments.image))
    released = load_released(arguments.folder, device=arguments.device)
    return answer_questions(released, [question], options=options)[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.inference.generate",
        description="Ask a released model about images.",
        epilog="example: python -m megatron_eve.inference.generate releases/eve-7b --image cat.jpg "
        '--prompt "What is the cat doing?"',
    )
    parser.add_argument("folder", type=Path, help="released Hugging Face folder")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--prompt", default="", help="the question")
    parser.add_argument(
        "--template",
        choices=("qwen2", "plain"),
        default="qwen2",
        help="plain: a caption, as stages 1 and 2.1 train it (default qwen2)",
    )
    parser.add_argument(
        "--resize-rule",
        choices=("train", "eval"),
        default="train",
        help="eval: the official benchmarks' rule, which also enlarges (default train)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
