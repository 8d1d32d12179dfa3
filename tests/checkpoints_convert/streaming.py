# SPDX-License-Identifier: Apache-2.0
"""Conversions in a process of their own, watched from outside: how much memory each holds at its peak.

Counted is RssAnon, the pages that belong to the process alone; those of mapped files do not, the kernel takes them back
when it likes. The process reports what it is about to do and waits for a line before it does it, so that each phase is
measured above what the process held before. What it frees goes back to the kernel at once, else a phase could use what
an earlier one left."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from checkpoints_convert.hf_config import model_json
from checkpoints_convert.names import tensor_rules
from checkpoints_convert.safetensors_file import write_file
from checkpoints_convert.tensors import EveView
from megatron_eve.config.schema import ModelConfig
from tests.support.tiny import tiny_model
from tools.bench.resident import anonymous_bytes, peak_anonymous_bytes


def large_model() -> ModelConfig:
    """220 MB in bf16; its largest tensor is a sixth of that."""
    return dataclasses.replace(
        tiny_model(layers=4),
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_kv_heads=4,
        head_dim=64,
        vocab_size=24_001,
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of a model's tensors: all of them, and the largest that lies in a checkpoint under one name."""

    total: int
    largest: int


def write_large_folder(folder: Path) -> Sizes:
    """The large model with random weights as a Hugging Face folder; never in memory as a whole."""
    model = large_model()
    folder.mkdir()
    headers = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for rule in tensor_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    write_file(
        folder / "model.safetensors",
        headers,
        lambda name: torch.randn(headers[name].shape, generator=generator).bfloat16(),
    )
    config = model_json(model, dtype="bfloat16", eos_id=1, pad_id=0, image_edge=16, run=None)
    (folder / "config.json").write_text(json.dumps(config))
    groups = EveView(headers, model, resize_vocabulary=False)
    sizes = [tensor.nbytes for tensor in groups.values()]
    return Sizes(sum(sizes), max(sizes))


def peaks(folder: Path) -> dict[str, int]:
    """Bytes that each phase of `main` held at its peak, above what the process held before it."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoints_convert.streaming", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    ) as process:
        assert process.stdin
        assert process.stdout
        found: dict[str, int] = {}
        for line in process.stdout:
            if not line.startswith("phase "):
                continue
            phase, before = line.split()[1], anonymous_bytes(process.pid)
            done = folder / f"{phase}.done"
            process.stdin.write("go\n")
            process.stdin.flush()
            peak = peak_anonymous_bytes(
                process.pid, until=lambda done=done: done.exists() or process.poll() is not None
            )
            found[phase] = peak - before
    assert process.returncode == 0
    return found


def main(folder: Path) -> None:
    """In the process that is watched."""
    from checkpoints_convert.hf_folder import SafetensorsFolder, write_safetensors
    from checkpoints_convert.hf_to_megatron import ImportOptions, import_hf
    from checkpoints_convert.megatron_folder import canonical_hash, read_megatron
    from checkpoints_convert.megatron_to_hf import hf_stream
    from checkpoints_convert.torch_dist import Chunk, write_tensors
    from checkpoints_convert.verify import compare_tensors
    from megatron_eve.parallel.groups import init_distributed

    options = ImportOptions(
        dtype=None,
        split=None,
        vocab_size=None,
        patch_embed_dim=12,
        special_token_std=1.0,
        seed=0,
        overwrite=False,
    )
    hf, megatron = folder / "hf", folder / "megatron"

    def convert() -> None:
        import_hf(hf, megatron, options)

    def convert_and_pad() -> None:
        """Every value of a resized table is in memory once."""
        import_hf(hf, folder / "padded", dataclasses.replace(options, vocab_size=24_064))

    def release() -> None:
        (folder / "back").mkdir()
        write_safetensors(folder / "back", hf_stream(read_megatron(megatron)))

    def release_shards() -> None:
        """From a checkpoint in which two processes wrote half of each tensor, to several files."""
        weights = read_megatron(megatron)
        headers = weights.tensors.headers
        chunks = []
        for name, header in headers.items():
            half = header.shape[0] // 2
            for rows in ((0, half), (half, header.shape[0])):
                read = lambda name=name, rows=rows: weights.tensors.rows(name, *rows)  # noqa: E731
                chunks.append(Chunk(name=name, rows=rows, read=read))
        halves = folder / "megatron-halves"
        write_tensors(halves, headers, chunks, num_layers=weights.model.num_layers)
        for name in ("config.txt", "common.pt", "metadata.json"):
            (halves / name).write_bytes((megatron / name).read_bytes())
        (halves / "complete.json").write_text('{"files": {}}')
        (folder / "shards").mkdir()
        stream = hf_stream(read_megatron(halves))
        write_safetensors(folder / "shards", stream, max_shard_bytes=50_000_000)

    def hashes() -> None:
        """As before a release: of the largest table and of a stack of layers, put together from halves."""
        tensors = read_megatron(folder / "megatron-halves").tensors
        for name in ("output_layer.weight", "decoder.layers.mlp.linear_fc1.vision.weight"):
            parts = tensors.parts_of(name)
            own = tuple(tensors.headers[parts[0]].shape)
            shape = (len(parts), *own) if parts != [name] else own
            assert canonical_hash(tensors, name, shape) is not None

    def compare() -> None:
        for found in (megatron, folder / "back", folder / "shards"):
            assert compare_tensors(hf, found).differences == ()

    def everything_at_once() -> None:
        """What the others are not: this must be seen."""
        held = [tensor.clone() for tensor in SafetensorsFolder(hf).values()]
        time.sleep(0.05)
        del held

    init_distributed(timeout_s=60)
    torch.set_num_threads(1)
    phases = (convert, convert_and_pad, release, release_shards, hashes, compare)
    for phase in (*phases, everything_at_once):
        print(f"phase {phase.__name__}", flush=True)
        sys.stdin.readline()
        phase()
        (folder / f"{phase.__name__}.done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
