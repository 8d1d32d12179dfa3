# SPDX-License-Identifier: Apache-2.0
"""Command line of checkpoint conversion: python -m checkpoints_convert COMMAND ...

    hf-to-megatron SOURCE DEST    Qwen2.5, Llama-3, Vicuna or EVE folder -> distributed checkpoint for any layout
    megatron-to-hf SOURCE DEST    distributed checkpoint -> folder that transformers or the official code loads
    release SOURCE DEST           the same with the run's facts in its model card, checksums, and a check that it loads
    verify A B                    compare weights byte by byte, or logits

Tensors are converted one at a time: a model of any size needs little more memory than its largest tensor.

Exit codes: 0 done, 1 a check failed or a checkpoint is bad, 2 wrong usage, 130 interrupted. The last line of output
says what was written where.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.command import end_with, reports_errors
from megatron_eve.config.schema import SplitConfig
from megatron_eve.errors import CheckpointError, ConfigError

from .new_folder import refuse_taken

Command = Callable[[argparse.Namespace], int]


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own deprecations
    command: Command = arguments.command
    return command(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m checkpoints_convert", description="Convert and compare checkpoints."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_import(
        _command(
            commands,
            "hf-to-megatron",
            _import,
            "Hugging Face folder -> distributed checkpoint",
            "hf-to-megatron models/Qwen2.5-7B-Instruct checkpoints/qwen2.5-7b --dtype bf16",
        )
    )
    export = _command(
        commands,
        "megatron-to-hf",
        _export,
        "distributed checkpoint -> Hugging Face folder",
        "megatron-to-hf runs/eve7b_stage3 releases/eve-7b",
    )
    _add_export(export)
    _add_layout(export)
    _add_release(
        _command(
            commands,
            "release",
            _release,
            "trained run -> Hugging Face folder for others to use",
            "release runs/eve7b_stage3 releases/eve-7b --results results.json --license apache-2.0",
        )
    )
    _add_verify(
        _command(
            commands,
            "verify",
            _verify,
            "compare two sets of weights",
            "verify models/Qwen2.5-7B-Instruct checkpoints/qwen2.5-7b --allow-extra",
        )
    )
    return parser


def _command(
    commands: Any, name: str, function: Command, summary: str, example: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example: python -m checkpoints_convert {example}",
    )
    parser.set_defaults(command=function)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("dest", type=Path, help="checkpoint folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as stored")
    parser.add_argument(
        "--split",
        type=_split,
        metavar="PARTS",
        help="components with vision weights of their own, made as copies of the text weights: 'all', or some of "
        "norm,attention,ffn joined by commas; default: as stored (none in a plain language model)",
    )
    parser.add_argument(
        "--vocab-size",
        type=_positive,
        metavar="ROWS",
        help="rows of embedding and output layer: cut, or pad with zeros; default: as stored",
    )
    parser.add_argument(
        "--patch-embed-dim",
        type=_positive,
        default=1024,
        metavar="CHANNELS",
        help="channels between the convolutions of a new patch embedding (default 1024)",
    )
    parser.add_argument(
        "--special-token-std",
        type=float,
        default=1.0,
        metavar="STD",
        help="standard deviation of a new CLS and SPL embedding (default 1.0, as official)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of a new patch embedding")
    _add_writing(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="run directory (its newest checkpoint), or a checkpoint folder"
    )
    parser.add_argument("dest", type=Path, help="Hugging Face folder to write")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="default: the run's")
    parser.add_argument(
        "--image-edge",
        type=_positive,
        metavar="PIXELS",
        help="images are scaled to at most this squared; default: the run's",
    )
    parser.add_argument(
        "--exif-rotation",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="pictures are turned as their metadata says; default: the run's, without a run yes",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="per safetensors file"
    )
    _add_writing(parser)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout",
        choices=("automodel", "official"),
        default="automodel",
        help="automodel: stands alone, for transformers' Auto classes (default); official: as baaivision/EVE reads it",
    )


def _add_release(parser: argparse.ArgumentParser) -> None:
    _add_export(parser)
    parser.set_defaults(layout="automodel")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results of megatron_eve.evaluation.easy_vqa or lmms-eval for the model card; may be given several times",
    )
    parser.add_argument("--license", metavar="ID", help="of the weights, for the model card")
    parser.add_argument(
        "--skip-check", action="store_true", help="do not load the folder (needs the memory)"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="Hugging Face folder or distributed checkpoint")
    parser.add_argument("second", type=Path, help="what it is compared with")
    parser.add_argument(
        "--allow-extra",
        action="store_true",
        help="tensors that only the second has are no difference",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare logits on a fixed question about a fixed picture instead (Hugging Face folders; on fixed token "
        "ids if one is a plain language model)",
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of --logits (default 1e-5)")


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="check, list the mapping, write nothing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing destination")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _split(text: str) -> SplitConfig:
    parts = {"norm", "attention", "ffn"} if text == "all" else set(text.split(","))
    if unknown := parts - {"norm", "attention", "ffn"}:
        raise argparse.ArgumentTypeError(
            f"{sorted(unknown)[0]!r} is no component; use all, or some of norm,attention,ffn"
        )
    return SplitConfig(norm="norm" in parts, attention="attention" in parts, ffn="ffn" in parts)


def _import(arguments: argparse.Namespace) -> int:
    _check_folders(arguments, holds="config.json", expected=" with config.json and *.safetensors")
    from .hf_to_megatron import ImportOptions, import_hf, planned_mapping

    options = ImportOptions(
        dtype=arguments.dtype,
        split=arguments.split,
        vocab_size=arguments.vocab_size,
        patch_embed_dim=arguments.patch_embed_dim,
        special_token_std=arguments.special_token_std,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    if arguments.dry_run:
        return _list_mapping(planned_mapping(arguments.source, options), arguments)
    written = import_hf(arguments.source, arguments.dest, options)
    print(f"wrote {written.num_tensors} {written.dtype} tensors to {arguments.dest}")
    if written.not_applied:
        print(f"not followed by a release (greedy, no penalty): {', '.join(written.not_applied)}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    _check_folders(arguments)
    from .megatron_to_hf import ExportOptions, export_hf, planned_mapping

    options = ExportOptions(
        tokenizer=arguments.tokenizer,
        image_edge=arguments.image_edge,
        exif_rotation=arguments.exif_rotation,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        overwrite=arguments.overwrite,
        layout=arguments.layout,
    )
    if arguments.dry_run:
        return _list_mapping(planned_mapping(arguments.source, options), arguments)
    num_bytes = export_hf(arguments.source, arguments.dest, options)
    what = "processor and code" if arguments.layout == "automodel" else "configuration, tokenizer"
    print(f"wrote {num_bytes / 1e6:,.1f} MB of weights, {what} to {arguments.dest}")
    return 0


def _check_folders(arguments: argparse.Namespace, *, holds: str = "", expected: str = "") -> None:
    """Refuses what it can before torch is imported.

    Raises: CheckpointError if the source is not there; ConfigError if the destination is taken or --overwrite would
    delete what is converted."""
    source, dest = arguments.source.resolve(), arguments.dest.resolve()
    if arguments.overwrite and source.is_relative_to(dest):
        raise ConfigError(
            f"{dest} holds the source {source}, which would be deleted; choose another name."
        )
    if not source.is_dir():
        what = "Hugging Face" if holds else "checkpoint"
        raise CheckpointError(f"no {what} folder {arguments.source}; give a folder{expected}.")
    if not (source / holds).exists():
        raise CheckpointError(f"{source / holds} not found; give a Hugging Face folder{expected}.")
    if not arguments.dry_run:
        refuse_taken(arguments.dest, overwrite=arguments.overwrite)


def _list_mapping(lines: Sequence[str], arguments: argparse.Namespace) -> int:
    """Raises: ConfigError if the destination is taken: what is not dry would be refused."""
    for line in lines:
        print(line)
    refuse_taken(arguments.dest, overwrite=arguments.overwrite)
    print(
        f"{len(lines)} tensors, all checked by name, shape and dtype; nothing written to {arguments.dest}"
    )
    return 0


def _release(arguments: argparse.Namespace) -> int:
    _check_folders(arguments)
    from megatron_eve.evaluation.results import read_results

    if arguments.dry_run:
        for path in arguments.results:
            read_results(path)
        return _export(arguments)
    from .megatron_to_hf import ExportOptions
    from .release import ReleaseOptions, release_run

    options = ReleaseOptions(
        export=ExportOptions(
            tokenizer=arguments.tokenizer,
            image_edge=arguments.image_edge,
            exif_rotation=arguments.exif_rotation,
            max_shard_bytes=int(arguments.max_shard_gb * 1e9),
            overwrite=arguments.overwrite,
        ),
        results=tuple(arguments.results),
        license=arguments.license,
        check=not arguments.skip_check,
    )
    num_bytes = release_run(arguments.source, arguments.dest, options)
    print(f"wrote {num_bytes / 1e6:,.1f} MB of weights, card and checksums to {arguments.dest}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    for folder in (arguments.first, arguments.second):
        if not folder.is_dir():
            raise CheckpointError(
                f"no folder {folder}; give a Hugging Face folder or a checkpoint."
            )
    from .verify import compare_constants, compare_tensors, logits_gap

    first, second = arguments.first, arguments.second
    if arguments.logits:
        gap = logits_gap(first, second)
        same = gap <= arguments.tolerance
        print(
            f"logits of {first} and {second} differ by {gap:.3g} at most: "
            f"{'within' if same else 'beyond'} the limit {arguments.tolerance:g}"
        )
        return 0 if same else 1
    result = compare_tensors(first, second, allow_extra=arguments.allow_extra)
    try:
        constants = compare_constants(first, second)
    except CheckpointError as error:  # another kind of model: its tensors can be compared
        print(f"constants of the models are not compared: {error}", file=sys.stderr)
        constants = ()
    for difference in (*constants, *result.differences):
        print(f"{difference.name}: {difference.reason}")
    verdict = f"{len(result.differences)} differ" if result.differences else "all the same"
    verdict += f"; {len(constants)} constants of the models differ" if constants else ""
    print(
        f"{result.num_tensors} tensors, {result.num_bytes / 1e6:,.1f} MB, of {first} and {second}: {verdict}"
    )
    return 1 if result.differences or constants else 0


if __name__ == "__main__":
    end_with(main)
