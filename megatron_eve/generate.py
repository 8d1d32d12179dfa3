# SPDX-License-Identifier: Apache-2.0
"""Ask a released model about images: python -m megatron_eve.generate FOLDER --image X --prompt Y

The answer is written to stdout as it comes; nothing else is. Greedy unless --temperature is given, on a GPU if there is
one. Exit codes: 0 done, 1 the folder or an image is bad, 2 wrong usage, 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.errors import ConfigError, DataError


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Answer one question and return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.template == "plain" and arguments.prompt:
        parser.error("--template plain writes a caption and takes no --prompt")
    if arguments.template == "plain" and not arguments.image:
        parser.error("--template plain needs at least one --image")
    if arguments.template != "plain" and not (arguments.prompt or arguments.image):
        parser.error("--prompt is missing (or use --template plain for a caption)")
    _answer(arguments)
    return 0


def _answer(arguments: argparse.Namespace) -> None:
    from megatron_eve.inference.release import read_release

    info = read_release(arguments.folder)
    encoded = [_read_image(path) for path in arguments.image]

    import torch  # seconds to import: not for --help, and not before a missing file is named

    from megatron_eve.inference.engine import Engine, Request, device_named
    from megatron_eve.inference.prompts import STOPS, ChatTurn, prepare_image
    from megatron_eve.inference.sampling import SamplingOptions

    options = SamplingOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        repetition_penalty=1.0
        if arguments.repetition_penalty is None
        else arguments.repetition_penalty,
        seed=arguments.seed,
    )
    if options.top_p < 1 and options.temperature == 0:
        raise ConfigError(
            f"--top-p {options.top_p} does nothing without --temperature above 0: the answer is greedy."
        )
    device = device_named(arguments.device)
    template = arguments.template or info.template
    options = replace(options, stop=STOPS[template])
    if arguments.repetition_penalty is None:
        options = replace(options, repetition_penalty=info.repetition_penalty)
    images = []
    for path, data in zip(arguments.image, encoded, strict=True):
        try:
            rule = arguments.resize_rule
            images.append(
                prepare_image(data, model=info.model, rules=info.images, resize_rule=rule)
            )
        except DataError as error:
            raise DataError(f"{path} cannot be used as an image: {error}") from error
    # Weights come last: a bad image is not worth the wait for them.
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    engine = Engine.load(arguments.folder, device=device, dtype=dtype)
    turn = ChatTurn("user", arguments.prompt, tuple(images))
    prompt = engine.prompt([turn], template=template)
    for piece in engine.stream(Request(prompt, options)):
        print(piece, end="", flush=True)
    print()


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give another file.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eve.generate",
        description="Ask a released model about images.",
        epilog="example: python -m megatron_eve.generate releases/eve-7b --image cat.jpg "
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
        help="plain: a caption, as stages 1 and 2.1 train it (default: the release's)",
    )
    parser.add_argument(
        "--resize-rule",
        choices=("train", "eval"),
        help="eval: the official benchmarks' rule, which also enlarges (default: the release's, train)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="default 1: all tokens")
    parser.add_argument(
        "--repetition-penalty", type=float, help="default: the release's, 1 (none); official: 1.05"
    )
    parser.add_argument("--seed", type=int, help="the same answer again when sampling")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: that of the weights"
    )
    return parser


if __name__ == "__main__":
    end_with(main)
