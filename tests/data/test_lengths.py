# SPDX-License-Identifier: Apache-2.0
"""Lengths equal what training makes of a sample; every unfit sample has its reason; the cache is used and is right."""

import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_eve.data.assemble import expand
from megatron_eve.data.plan.lengths import LengthSettings, SampleLengths, load_lengths, target_sizes
from megatron_eve.data.plan.packing import PackShape
from megatron_eve.data.read.conversation import encode_sample
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import IGNORE, Sample, Turn
from tests.data.conftest import WriteShards, make_sample, mixed_samples

SETTINGS = LengthSettings(
    template="qwen2", image_edge=128, max_aspect_ratio=10.0, max_text_tokens=80, pixels_per_token=32
)
SHAPE = PackShape(pack_tokens=256, align=16)


def load(table: ShardTable, qwen: Tokenizer, **changes: object) -> SampleLengths:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    of_sources = [settings] * table.num_sources
    return load_lengths(table, settings=of_sources, tokenizer=qwen, shape=SHAPE, max_unreadable=0)


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("lengths-*.npz"))


def test_lengths_are_those_of_the_expanded_sample(
    write_shards: WriteShards, qwen: Tokenizer
) -> None:
    samples = mixed_samples(25)
    table = ShardTable.open([write_shards("a", samples[:15]), write_shards("b", samples[15:])])
    lengths = load(table, qwen)
    assert not lengths.unfit
    for index, sample in enumerate(samples):
        encoded = encode_sample(
            sample.turns,
            num_images=len(sample.images),
            template="qwen2",
            tokenizer=qwen,
            max_text_tokens=80,
        )
        grids = [(h // 32, w // 32) for h, w in target_sizes(sample, settings=SETTINGS)]
        expanded = expand(encoded, grids=grids)
        is_vision = expanded.is_vision
        assert lengths.num_vision[index] == is_vision.sum()
        assert lengths.num_text[index] == (~is_vision).sum()
        assert lengths.num_labels[index] == (expanded.labels[1:] != IGNORE).sum() > 0


@pytest.mark.parametrize("sample_align", [4, 32])
def test_aligned_lengths_count_each_samples_padding_as_text(
    write_shards: WriteShards, qwen: Tokenizer, sample_align: int
) -> None:
    """The cache of other settings is not read: the folder has been measured without alignment before."""
    table = ShardTable.open([write_shards("a", mixed_samples(25))])
    plain, aligned = load(table, qwen), load(table, qwen, sample_align=sample_align)
    assert not aligned.unfit
    np.testing.assert_array_equal(aligned.num_vision, plain.num_vision)
    whole = aligned.num_vision + aligned.num_text
    padding = aligned.num_text - plain.num_text
    assert (whole % sample_align == 0).all()
    assert ((padding >= 0) & (padding < sample_align)).all()
    assert padding.any()


def bad_samples() -> list[tuple[Sample, str | None]]:
    good = make_sample(0)
    question, answer = good.turns
    return [
        (good, None),
        (dataclasses.replace(good, turns=(Turn("human", "What?"), answer)), "image_without_mark"),
        (dataclasses.replace(good, turns=(question, Turn("gpt", ""))), "empty_answer"),
        (dataclasses.replace(good, turns=(question, Turn("gpt", "a<|im_end|>"))), "special_text"),
        (dataclasses.replace(good, image_sizes=((10, 101),)), "aspect_ratio"),
        (dataclasses.replace(good, image_sizes=((0, 10),)), "bad_image_size"),
        (dataclasses.replace(good, turns=(question, Turn("gpt", "long " * 200))), None),
        (make_sample(7, sizes=[(128, 128)] * 10), "too_long"),
        (make_sample(8, sizes=[]), None),
    ]


def test_unfit_samples_have_their_reason_and_no_length(
    write_shards: WriteShards, qwen: Tokenizer
) -> None:
    cases = bad_samples()
    samples = [dataclasses.replace(sample, id=f"case-{i}") for i, (sample, _) in enumerate(cases)]
    table = ShardTable.open([write_shards("a", samples)])
    lengths = load(table, qwen)
    expected = {i: reason for i, (_, reason) in enumerate(cases) if reason is not None}
    assert {i: entry.reason for i, entry in lengths.unfit.items()} == expected
    named = {i: entry.id for i, entry in lengths.unfit.items() if entry.id}
    assert named == {i: f"case-{i}" for i in (1, 2, 3)}  # the others did not need their row
    for i, entry in lengths.unfit.items():
        assert entry.message
        path, row = table.place(i)
        assert entry.key == (str(path), row)
    assert lengths.reasons["too_long"] == 1
    assert np.flatnonzero(~lengths.usable).tolist() == list(expected)
    assert (lengths.num_text[list(expected)] == 0).all()
    assert lengths.num_text[6] == 79  # cut to 80 with its image, not refused


def test_cache_is_read_and_belongs_to_its_settings(
    write_shards: WriteShards, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards("a", [sample for sample, _ in bad_samples()])
    table = ShardTable.open([folder])
    first = load(table, qwen)
    assert len(caches(folder)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("megatron_eve.data.plan.counting.encode_samples", None)  # not called again
        second = load(table, qwen)
        load(table, qwen, image_edge=96)  # nor for what resizing and packing decide
        load(table, qwen, sample_align=8, max_aspect_ratio=2.0)
    assert first.unfit == second.unfit
    np.testing.assert_array_equal(first.num_vision, second.num_vision)
    np.testing.assert_array_equal(first.num_text, second.num_text)
    load(table, qwen, max_text_tokens=79)
    load(table, qwen, template="plain")
    load_lengths(
        table,
        settings=[SETTINGS],
        tokenizer=dataclasses.replace(qwen, fingerprint="another"),
        shape=SHAPE,
        max_unreadable=0,
    )
    assert len(caches(folder)) == 4
    assert not list(folder.glob("*.tmp-*"))


def test_rebuilt_shards_are_counted_anew(write_shards: WriteShards, qwen: Tokenizer) -> None:
    folder = write_shards("a", mixed_samples(5))
    load(ShardTable.open([folder]), qwen)
    kept = caches(folder)[0]
    content = kept.read_bytes()
    for file in folder.iterdir():
        file.unlink()
    write_shards("a", mixed_samples(9))
    kept.write_bytes(content)
    assert load(ShardTable.open([folder]), qwen).num_text.size == 9


def test_unwritable_folder_is_cached_elsewhere_and_said(
    write_shards: WriteShards,
    qwen: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_shards("a", mixed_samples(4))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    caplog.set_level(logging.INFO, "megatron_eve.data.plan.counting")
    load(ShardTable.open([folder]), qwen)
    assert not caches(folder)
    assert len(list((tmp_path / "cache").rglob("lengths-*.npz"))) == 1
    assert f"lengths of {folder} are kept in" in caplog.text
