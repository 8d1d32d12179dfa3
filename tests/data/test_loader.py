# SPDX-License-Identifier: Apache-2.0
"""The loader end to end: same packs for any ranks and workers, exact resume, bad images masked, errors that name."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eve.config.schema import BatchConfig, DataConfig
from megatron_eve.data.loader import PackLoader
from megatron_eve.data.read.image import decode_reference
from megatron_eve.data.read.image_size import train_size
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import VISION_PATCH, VISION_SPL, Pack, Sample
from megatron_eve.errors import DataError
from tests.data.conftest import MODEL, WriteShards, data_config, make_sample, mixed_samples
from tests.support.patches import unpatchify

SAMPLES = BatchConfig(unit="samples", size=7)
PACKS = BatchConfig(unit="packs", size=4)


@pytest.fixture
def data(write_shards: WriteShards, qwen_folder: Path) -> DataConfig:
    """Two sources of 20 and 14 samples, of which two are unfit."""
    first, second = mixed_samples(20), mixed_samples(14, start=20)
    first[5] = dataclasses.replace(first[5], turns=first[5].turns[:1])
    second[2] = dataclasses.replace(second[2], image_sizes=((1, 1000),) * len(second[2].images))
    folders = [write_shards("a", first), write_shards("b", second)]
    return data_config(folders, tokenizer=qwen_folder, proportions=[19.0, 13.0])


def open_loader(
    data: DataConfig,
    qwen: Tokenizer,
    *,
    batch: BatchConfig = SAMPLES,
    rank: int = 0,
    size: int = 1,
    report: Path | None = None,
) -> PackLoader:
    return PackLoader(
        data=data,
        batch=batch,
        model=MODEL,
        trainable=("patch_embedding", "vision", "text"),
        tokenizer=qwen,
        data_rank=rank,
        data_size=size,
        device="cpu",
        quarantine_report=report,
    )


def digest(pack: Pack) -> str:
    """Hash of every byte of a pack."""
    content = hashlib.sha256()
    for field in dataclasses.fields(pack):
        value = getattr(pack, field.name)
        part = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        content.update(field.name.encode() + part)
    return content.hexdigest()


def union(steps_of_ranks: list[list[list[Pack]]]) -> list[Counter[str]]:
    """Per step, the packs with samples in them, of all ranks together."""
    return [
        Counter(digest(pack) for packs in step for pack in packs if pack.sample_ids)
        for step in zip(*steps_of_ranks, strict=True)
    ]


def run(loader: PackLoader, steps: int) -> list[list[Pack]]:
    with loader:
        return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_ranks_together_are_the_single_rank(
    data: DataConfig, qwen: Tokenizer, batch: BatchConfig
) -> None:
    steps = 7
    alone = run(open_loader(data, qwen, batch=batch), steps)
    for size in (2, 4):
        ranks = [
            run(open_loader(data, qwen, batch=batch, rank=rank, size=size), steps)
            for rank in range(size)
        ]
        assert union(ranks) == union([alone])
        for step in zip(*ranks, strict=True):
            assert len({len(packs) for packs in step}) == 1, "as many micro-batches on every rank"
    if batch.unit == "samples":
        assert [sum(len(p.sample_ids) for p in packs) for packs in alone] == [7] * steps
    else:
        assert [len(packs) for packs in alone] == [4] * steps


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_workers_change_nothing(data: DataConfig, qwen: Tokenizer, batch: BatchConfig) -> None:
    alone = run(open_loader(data, qwen, batch=batch), 6)
    threaded = dataclasses.replace(data, num_workers=3, prefetch_steps=3)
    before = threading.active_count()
    found = run(open_loader(threaded, qwen, batch=batch), 6)
    assert [[digest(p) for p in step] for step in found] == [[digest(p) for p in s] for s in alone]
    assert threading.active_count() == before, "close() ends the threads"


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_resume_on_more_ranks_in_the_middle_of_an_epoch(
    data: DataConfig, qwen: Tokenizer, batch: BatchConfig
) -> None:
    whole = union([run(open_loader(data, qwen, batch=batch), 9)])
    threaded = dataclasses.replace(data, num_workers=2, prefetch_steps=3)
    pair = [open_loader(threaded, qwen, batch=batch, rank=rank, size=2) for rank in range(2)]
    first = union([[next(loader) for _ in range(4)] for loader in pair])
    states = [json.dumps(loader.state_dict()) for loader in pair]
    for loader in pair:
        loader.close()
    assert states[0] == states[1], "the state is the same on every rank"
    four = [open_loader(data, qwen, batch=batch, rank=rank, size=4) for rank in range(4)]
    for loader in four:
        loader.load_state_dict(json.loads(states[0]))
        assert json.dumps(loader.state_dict()) == states[0]
    assert first + union([run(loader, 5) for loader in four]) == whole


def test_loading_a_state_discards_what_was_read_ahead(data: DataConfig, qwen: Tokenizer) -> None:
    threaded = dataclasses.replace(data, num_workers=2, prefetch_steps=2)
    with open_loader(threaded, qwen) as loader:
        start = loader.state_dict()
        first = [digest(pack) for pack in next(loader)]
        next(loader)
        loader.load_state_dict(start)
        assert [digest(pack) for pack in next(loader)] == first


def test_epoch_holds_every_fit_sample_once_and_counts(
    data: DataConfig, qwen: Tokenizer, tmp_path: Path
) -> None:
    report = tmp_path / "quarantine.jsonl"
    loader = open_loader(data, qwen, batch=BatchConfig(unit="samples", size=8), report=report)
    assert loader.epoch_size.samples == 32
    packs = [pack for step in run(loader, 4) for pack in step]
    names = [name for pack in packs for name in pack.sample_ids]
    assert sorted(names) == [f"sample-{i:05d}" for i in range(34) if i not in (5, 22)]
    reasons = sorted(json.loads(line)["reason"] for line in report.read_text().splitlines())
    assert reasons == ["aspect_ratio", "no_answer"]
    real = sum(pack.num_real_text + pack.num_real_vision for pack in packs)
    assert loader.epoch_size.tokens == real


def test_pixels_and_text_are_those_of_the_sample(
    write_shards: WriteShards, qwen_folder: Path, qwen: Tokenizer
) -> None:
    sample = make_sample(3, sizes=[(90, 128)])
    data = data_config([write_shards("one", [sample])], tokenizer=qwen_folder, template="plain")
    ((pack,),) = run(open_loader(data, qwen, batch=BatchConfig(unit="samples", size=1)), 1)
    assert pack.patches is not None
    image = unpatchify(pack.patches.numpy(), rows=3)
    expected = decode_reference(sample.images[0], target_size=(96, 128))
    assert np.array_equal(image, expected)
    assert qwen.decode(pack.label_targets.tolist()) == sample.turns[1].text + "\n"
    assert int((pack.vision_kind == VISION_PATCH).sum()) == 12
    first_row = int(pack.label_rows[0])
    assert pack.vision_kind[first_row] == VISION_SPL, "the image's last token predicts the text"


def test_pixels_lie_in_the_order_of_the_samples(data: DataConfig, qwen: Tokenizer) -> None:
    samples = {sample.id: sample for sample in mixed_samples(20) + mixed_samples(14, start=20)}
    packs = [pack for step in run(open_loader(data, qwen), 2) for pack in step]
    assert max(len(pack.sample_ids) for pack in packs) > 2
    for pack in packs:
        assert pack.patches is not None
        patches, position = pack.patches.numpy(), 0
        for name in pack.sample_ids:
            sample = samples[name]
            for image, (height, width) in zip(sample.images, sample.image_sizes, strict=True):
                size = train_size(height, width, edge=128)
                count = size[0] * size[1] // 1024
                found = unpatchify(patches[position : position + count], rows=size[0] // 32)
                expected = decode_reference(image, target_size=size)
                assert np.array_equal(found, expected)
                position += count
        assert position == len(patches)


@pytest.mark.parametrize("batch", [SAMPLES, PACKS], ids=["samples", "packs"])
def test_aligned_samples_are_planned_as_long_as_they_become(
    data: DataConfig, qwen: Tokenizer, batch: BatchConfig
) -> None:
    """Every sample and every padding sequence can be cut for context parallelism; labels are those of short samples."""
    aligned = dataclasses.replace(data, sample_align=8)
    packs = [pack for step in run(open_loader(aligned, qwen, batch=batch), 3) for pack in step]
    for pack in packs:
        assert all(length % 8 == 0 for length in pack.cu_seqlens.diff().tolist())
        assert pack.num_tokens == 256
    assert sum(len(pack.sample_ids) for pack in packs) > 10
    if batch.unit == "samples":
        before = [pack for step in run(open_loader(data, qwen, batch=batch), 3) for pack in step]
        for field in ("num_real_text", "num_real_vision"):
            assert sum(getattr(p, field) for p in packs) == sum(getattr(p, field) for p in before)
        labels = [sum(p.label_targets.numel() for p in group) for group in (packs, before)]
        assert labels[0] == labels[1]


def test_each_source_is_written_with_its_own_template(
    write_shards: WriteShards, qwen_folder: Path, qwen: Tokenizer
) -> None:
    """The same samples twice: as captions without a word of the chat template, and as a conversation."""
    folders = [write_shards(name, [make_sample(i) for i in range(4)]) for name in ("a", "b")]
    config = data_config(folders, tokenizer=qwen_folder)
    sources = (dataclasses.replace(config.sources[0], template="plain"), config.sources[1])
    config = dataclasses.replace(config, sources=sources, pack_tokens=1024)
    batch = BatchConfig(unit="samples", size=8)
    texts = []
    for pack in run(open_loader(config, qwen, batch=batch), 1)[0]:
        ids = torch.zeros(pack.num_tokens, dtype=torch.int64)
        ids[pack.modality_order[pack.num_vision :]] = pack.text_ids
        begins = pack.cu_seqlens.tolist()
        for begin, end in itertools.pairwise(begins[: len(pack.sample_ids) + 1]):
            texts.append(qwen.decode(ids[begin:end].tolist()))
    assert len(texts) == 8
    assert sum("ASSISTANT:" in text for text in texts) == 4
    assert sum("What is it?" in text for text in texts) == 4  # `plain` leaves the human turn out


def broken_image_set() -> list[Sample]:
    samples = [make_sample(i) for i in range(6)]
    data = samples[2].images[0]
    samples[2] = dataclasses.replace(samples[2], images=(data[: len(data) // 2],))
    return samples


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_image_is_masked_in_place_and_reported(
    write_shards: WriteShards, qwen_folder: Path, qwen: Tokenizer, tmp_path: Path, num_workers: int
) -> None:
    samples = broken_image_set()
    folder = write_shards("broken", samples)
    good = write_shards("good", [make_sample(i) for i in range(6)])
    report = tmp_path / "run" / "quarantine.jsonl"
    batch = BatchConfig(unit="samples", size=6)
    config = data_config([folder], tokenizer=qwen_folder, num_workers=num_workers)
    loader = open_loader(config, qwen, batch=batch, report=report)
    (broken,) = run(loader, 1)
    (whole,) = run(open_loader(data_config([good], tokenizer=qwen_folder), qwen, batch=batch), 1)
    assert [pack.sample_ids for pack in broken] == [pack.sample_ids for pack in whole]
    for found, expected in zip(broken, whole, strict=True):
        assert found.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
        assert found.text_ids.tolist() == expected.text_ids.tolist()
        hit = "sample-00002" in found.sample_ids
        assert found.quarantined == ((("sample-00002", "undecodable"),) if hit else ())
        assert (found.label_rows.numel() < expected.label_rows.numel()) == hit
        assert found.patches is not None
        grey = found.patches.view(-1, 4, 3, 256) == torch.tensor([122, 116, 104]).view(1, 1, 3, 1)
        assert bool(grey.flatten(1).all(1).any()) == hit
    (line,) = [json.loads(text) for text in report.read_text().splitlines()]
    assert (line["id"], line["source"], line["reason"]) == ("sample-00002", "test", "undecodable")
    assert "bytes starting" in line["message"]


def test_samples_left_out_are_reported_once_by_the_first_rank(
    data: DataConfig, qwen: Tokenizer, tmp_path: Path
) -> None:
    """However often the run starts."""
    report = tmp_path / "quarantine.jsonl"
    for rank in (0, 1, 0, 1):
        open_loader(data, qwen, rank=rank, size=2, report=report).close()
    lines = [json.loads(text) for text in report.read_text().splitlines()]
    assert [(line["id"], line["reason"]) for line in lines] == [
        ("sample-00005", "no_answer"),
        ("sample-00022", "aspect_ratio"),
    ]


def test_rank_outside_is_refused(data: DataConfig, qwen: Tokenizer) -> None:
    with pytest.raises(DataError, match="data_rank=2 is not one of data_size=2"):
        open_loader(data, qwen, rank=2, size=2)


def test_a_process_forked_while_threads_hold_decoders_can_exit(
    data: DataConfig, qwen: Tokenizer
) -> None:
    """Ours forks nothing, a library may; with the decoders in thread-local storage the child hung for ever."""
    with open_loader(dataclasses.replace(data, num_workers=2), qwen) as loader:
        next(loader)
        child = multiprocessing.get_context("fork").Process(target=len, args=((),))
        child.start()
        child.join(timeout=30)
        stuck = child.is_alive()
        child.kill()
    assert not stuck
