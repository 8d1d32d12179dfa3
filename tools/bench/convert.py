# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of checkpoint conversion, both directions, beside a plain copy of the same safetensors files.

The copy is what safetensors' own `load_file` and `save_file` do, file by file. All three read the same weights (or, for
the way back, the checkpoint made of them) from the page cache, write to the same disk and end with fsync; they take
turns. Memory is measured in a process of its own for each, as the peak of the pages that belong to it alone, above what
it held when its modules were imported. A result is refused if the weights do not come back to the byte.

    python -m tools.bench.convert --out runs/bench
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.hf_config import FULL_SPLIT, model_json
from checkpoints_convert.hf_folder import TensorStream, write_safetensors
from checkpoints_convert.hf_to_megatron import ImportOptions, import_hf
from checkpoints_convert.megatron_folder import read_megatron
from checkpoints_convert.megatron_to_hf import hf_stream
from checkpoints_convert.names import tensor_rules
from checkpoints_convert.tensors import EveView
from checkpoints_convert.verify import compare_tensors
from megatron_eve.command import end_with
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.schema import ModelConfig
from megatron_eve.parallel.groups import init_distributed
from tools.bench.report import (
    BenchmarkError,
    Seconds,
    add_output_options,
    markdown_table,
    median_ratio,
    run_benchmark,
)
from tools.bench.resident import anonymous_bytes, peak_anonymous_bytes

WANTED_SPEED = 0.8  # of the plain copy's
_MIB = 2**20
_SHARD = 500 * _MIB
_SCRATCH = "convert-scratch"
_DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")
_OPTIONS = ImportOptions(
    dtype=None,
    split=None,
    vocab_size=None,
    patch_embed_dim=1024,
    special_token_std=1.0,
    seed=0,
    overwrite=False,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What is converted: a Hugging Face folder and the checkpoint made of it, and their sizes in bytes."""

    hf: Path
    megatron: Path
    total: int
    largest: int  # tensor of the checkpoint

    def copy(self, dest: Path) -> None:
        """The plain copy."""
        dest.mkdir()
        for path in sorted(self.hf.glob("*.safetensors")):
            save_file(load_file(path), dest / path.name, metadata={"format": "pt"})
            _sync(dest / path.name)

    def to_megatron(self, dest: Path) -> None:
        """hf-to-megatron."""
        import_hf(self.hf, dest, _OPTIONS)

    def to_hf(self, dest: Path) -> None:
        """The weights of megatron-to-hf."""
        dest.mkdir()
        write_safetensors(dest, hf_stream(read_megatron(self.megatron)), max_shard_bytes=_SHARD)


def bench_model(*, hidden_size: int, num_layers: int, vocab_size: int) -> ModelConfig:
    """EVEv2-7B's shape at another scale."""
    model = load_recipe("eve7b_stage2_2").model
    scale = hidden_size / model.hidden_size
    return dataclasses.replace(
        model,
        hidden_size=hidden_size,
        ffn_hidden_size=round(model.ffn_hidden_size * scale / 64) * 64,
        num_attention_heads=hidden_size // model.head_dim,
        num_kv_heads=max(1, hidden_size // model.head_dim // 7),
        num_layers=num_layers,
        vocab_size=vocab_size,
        split=FULL_SPLIT,
    )


def make_material(folder: Path, model: ModelConfig) -> Material:
    """Random bf16 weights, in files of 500 MiB.

    Raises: BenchmarkError if they do not come back to the byte."""
    material_hf = folder / "hf"
    material_hf.mkdir(parents=True)
    headers = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for rule in tensor_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        return torch.randn(headers[name].shape, generator=generator).bfloat16()

    write_safetensors(material_hf, TensorStream(headers, draw), max_shard_bytes=_SHARD)
    config = model_json(model, dtype="bfloat16", eos_id=1, pad_id=0, image_edge=800, run=None)
    (material_hf / "config.json").write_text(json.dumps(config))
    sizes = [tensor.nbytes for tensor in EveView(headers, model, resize_vocabulary=False).values()]
    material = Material(
        hf=material_hf, megatron=folder / "megatron", total=sum(sizes), largest=max(sizes)
    )
    material.to_megatron(material.megatron)
    material.to_hf(folder / "back")
    if compare_tensors(material_hf, folder / "back").differences:
        raise BenchmarkError("the weights do not come back as they were")
    shutil.rmtree(folder / "back")
    return material


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def take_turns(material: Material, folder: Path, *, rounds: int) -> dict[str, Seconds]:
    """Seconds of the copy and of both directions, round by round, after one round that is not counted."""
    contenders = {
        "copy": material.copy,
        "hf-to-megatron": material.to_megatron,
        "megatron-to-hf": material.to_hf,
    }
    names, seconds = list(contenders), {name: Seconds() for name in contenders}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            dest = folder / "written"
            shutil.rmtree(dest, ignore_errors=True)
            os.sync()
            wall, cpu = time.perf_counter(), time.process_time()
            contenders[name](dest)
            if number > 0:
                seconds[name].wall.append(time.perf_counter() - wall)
                seconds[name].cpu.append(time.process_time() - cpu)
    shutil.rmtree(folder / "written", ignore_errors=True)
    return seconds


def peak_memory(material: Material, direction: str, dest: Path) -> int:
    """Bytes that a direction holds at its peak above what its process held after the imports, in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_convert_alone, args=(material, direction, dest, theirs))
    worker.start()
    theirs.close()
    try:
        ours.recv()
        before = anonymous_bytes(worker.pid or 0)
        ours.send("go")
        peak = peak_anonymous_bytes(worker.pid or 0, until=ours.poll)
        ours.recv()
    except EOFError:
        raise BenchmarkError(f"{direction} failed; its error is above") from None
    finally:
        worker.join(timeout=20)
        worker.kill()
    return peak - before


def _convert_alone(material: Material, direction: str, dest: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    init_distributed(timeout_s=600)
    pipe.send("ready")
    pipe.recv()
    (material.to_megatron if direction == "hf-to-megatron" else material.to_hf)(dest)
    pipe.send("done")


def measure(folder: Path, model: ModelConfig, *, rounds: int) -> list[dict[str, Any]]:
    """One row a direction. `folder`, which must not exist, is removed again."""
    folder.mkdir(parents=True)
    try:
        material = make_material(folder, model)
        peaks = {
            name: peak_memory(material, name, folder / f"memory-{name}") for name in _DIRECTIONS
        }
        for name in _DIRECTIONS:
            shutil.rmtree(folder / f"memory-{name}")
        seconds = take_turns(material, folder, rounds=rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    copy = seconds["copy"]
    return [
        {
            "direction": name,
            "bytes": material.total,
            "largest_tensor_bytes": material.largest,
            "peak_bytes_above_imports": peaks[name],
            "seconds": seconds[name].as_json(),
            "copy_seconds": copy.as_json(),
            "speed_ratio": round(median_ratio(copy.wall, seconds[name].wall), 3),
            "cpu_ratio": round(median_ratio(copy.cpu, seconds[name].cpu), 3),
            "wanted_speed_ratio": WANTED_SPEED,
        }
        for name in _DIRECTIONS
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        [
            {
                "direction": row["direction"],
                "weights, MiB": f"{row['bytes'] / _MIB:,.0f}",
                "largest tensor, MiB": f"{row['largest_tensor_bytes'] / _MIB:,.0f}",
                "peak above imports, MiB": f"{row['peak_bytes_above_imports'] / _MIB:,.0f}",
                "MiB/s": f"{row['bytes'] / _MIB / statistics.median(row['seconds']['wall']):,.0f}",
                "plain copy, MiB/s": (
                    f"{row['bytes'] / _MIB / statistics.median(row['copy_seconds']['wall']):,.0f}"
                ),
                "speed, of the copy's": f"{row['speed_ratio']:.2f}",
                "by CPU time": f"{row['cpu_ratio']:.2f}",
                "wanted": f">= {row['wanted_speed_ratio']}",
            }
            for row in rows
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.convert",
        description="Speed and memory of conversion beside a plain safetensors copy.",
        epilog="example: python -m tools.bench.convert --out runs/bench",
    )
    add_output_options(parser, name="convert")
    parser.add_argument("--hidden", type=int, default=1792, help="hidden size (1792)")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (3)")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of the embedding (32000)")
    parser.add_argument("--rounds", type=int, default=7, help="of each, in turns (7)")
    options = parser.parse_args(arguments)
    folder = options.out / _SCRATCH

    def measure_both() -> list[dict[str, Any]]:
        if folder.exists():
            raise BenchmarkError(f"{folder} exists, of a run that was stopped; remove it.")
        init_distributed(timeout_s=600)
        model = bench_model(
            hidden_size=options.hidden, num_layers=options.layers, vocab_size=options.vocab
        )
        return measure(folder, model, rounds=options.rounds)

    return run_benchmark(options, name="convert", measure=measure_both, table=_table)


if __name__ == "__main__":
    end_with(main)
