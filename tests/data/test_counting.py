# SPDX-License-Identifier: Apache-2.0
"""What was counted is kept part by part, shared by processes, noticed when damaged, and never counted again."""

import dataclasses
import os
import shlex
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_eve.data.plan import counting
from megatron_eve.data.plan.counting import CountedSource, TextSettings
from megatron_eve.data.plan.counts_file import SourceCounts, load_counts, save_counts
from megatron_eve.data.plan.lengths import unreadable_limit
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.errors import ConfigError, DataError, ElsewhereError
from tests.data.conftest import WriteShards, data_config, mixed_samples
from tests.data.test_loader import open_loader

SETTINGS = TextSettings(template="qwen2", max_text_tokens=80)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "PART_SAMPLES", 4)
    monkeypatch.setattr(counting, "_CHUNK", 3)
    monkeypatch.setattr(counting, "_LOOK_S", 0.01)


@pytest.fixture
def shards(write_shards: WriteShards) -> Path:
    return write_shards("a", mixed_samples(18))


def source_of(shards: Path, qwen: Tokenizer, *, max_unreadable: int = 0) -> CountedSource:
    return CountedSource(
        ShardTable.open([shards]),
        0,
        settings=SETTINGS,
        tokenizer=qwen,
        max_unreadable=max_unreadable,
    )


def equal(left: SourceCounts, right: SourceCounts) -> bool:
    arrays = ("num_text", "num_labels", "num_images", "image_sizes")
    same = all(np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays)
    return same and left.unfit == right.unfit


class Killed(BaseException):
    """A process that ends in the middle."""


def test_a_counting_that_is_killed_goes_on_where_it_was(
    shards: Path, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = source_of(shards, qwen).load()
    source_of(shards, qwen).path.unlink()
    source, calls = source_of(shards, qwen), [0]

    def killed() -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise Killed

    with pytest.raises(Killed):
        source.load(alive=killed)
    missing = source.missing_parts()
    assert 0 < len(missing) < 5
    assert source.missing_samples() < 18
    counted: list[int] = []
    real = CountedSource._count
    monkeypatch.setattr(
        CountedSource,
        "_count",
        lambda self, part, *, alive: counted.append(part) or real(self, part, alive=alive),
    )
    assert equal(source_of(shards, qwen).load(), whole)
    assert counted == missing
    assert [path.name for path in shards.glob("lengths-*")] == [source.path.name]


def test_processes_share_the_parts(
    shards: Path, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = CountedSource._count
    monkeypatch.setattr(
        CountedSource,
        "_count",
        lambda self, part, *, alive: counted.append(part) or real(self, part, alive=alive),
    )
    found: dict[float, SourceCounts] = {}

    def load(share: float) -> None:
        found[share] = source_of(shards, qwen).load(share=share)

    threads = [threading.Thread(target=load, args=(share,)) for share in (0.0, 0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert equal(found[0.0], found[0.5])
    assert sorted(counted) == list(range(5))


def test_a_waiting_process_looks_around(
    shards: Path, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another holds a part's lock, `alive` is called, and may end the waiting."""
    source = source_of(shards, qwen)
    monkeypatch.setattr(CountedSource, "count", lambda *_, **__: None)
    calls = [0]

    def alive() -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise ElsewhereError("another process has failed")

    with pytest.raises(ElsewhereError):
        source.load(alive=alive)


@pytest.mark.parametrize("kind", ["whole", "part"])
def test_damaged_counts_are_counted_again(
    shards: Path, qwen: Tokenizer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = source_of(shards, qwen)
    if kind == "whole":
        whole = source.load()
        path = source.path
    else:
        for part in source.missing_parts():
            source.count(part)
        path = source._part_path(2)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    counts = source_of(shards, qwen).load()
    assert f"{path}: damaged" in caplog.text
    assert counts.num_text.size == 18
    assert (counts.num_text > 0).all()
    if kind == "whole":
        assert equal(counts, whole)


def test_no_damaged_byte_gives_other_counts(shards: Path, qwen: Tokenizer) -> None:
    source = source_of(shards, qwen)
    whole = source.load()
    content = source.path.read_bytes()
    for at in range(0, len(content), 7):
        source.path.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            found = load_counts(source.path, num_samples=18)
        except Exception:
            continue
        assert equal(found, whole)


def test_counts_that_cannot_be_kept_are_one_line(
    shards: Path, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DataError, match=r"lengths-.*cannot be kept \(.*No space left"):
        source_of(shards, qwen).load()


def test_rows_that_can_be_read_again_are_taken_in_when_asked(shards: Path, qwen: Tokenizer) -> None:
    whole = source_of(shards, qwen).load()
    for path in shards.glob("lengths-*"):
        path.unlink()
    shard = shards / "shard.00000.mds"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"It is number 1.", b"It is \xffumber 1."))
    source = source_of(shards, qwen, max_unreadable=1)
    assert list(source.load().unfit) == [1]
    shard.write_bytes(content)
    assert list(source.load().unfit) == [1], "not before somebody asks"
    assert source.forget_unreadable() == 1
    assert equal(source.load(), whole)


def test_more_than_the_limit_is_refused_and_not_kept(shards: Path, qwen: Tokenizer) -> None:
    """Neither in one part nor spread over several; repaired, the same start goes on."""
    shard = shards / "shard.00000.mds"
    content = shard.read_bytes()
    damaged = content.replace(b"It is number", b"It is \xffumber")
    shard.write_bytes(damaged)
    assert damaged.count(b"It is \xffumber") > 4, "more than a part"
    for limit in (0, 4):
        with pytest.raises(
            DataError, match=f"data.max_unreadable allows {limit}; the first: .*mds"
        ):
            source_of(shards, qwen, max_unreadable=limit).load()
    shard.write_bytes(content)
    assert not source_of(shards, qwen).load().unfit


def test_the_trainer_names_the_command_for_more_than_it_counts(
    write_shards: WriteShards, qwen: Tokenizer, qwen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_eve.data.loader.START_LIMIT", 10)
    shards = write_shards("two words", mixed_samples(18))
    data = dataclasses.replace(data_config([shards], tokenizer=qwen_folder), template="plain")
    with pytest.raises(ConfigError) as refused:
        open_loader(data, qwen)
    command = (
        f"megatron-eve data count '{shards}' --tokenizer {qwen_folder} --template plain "
        "--max-text-tokens 200"
    )
    assert command in str(refused.value)
    assert "18 samples are not counted yet" in str(refused.value)
    from data_prep.__main__ import main

    assert main([*shlex.split(command)[2:], "--workers", "1"]) == 0
    open_loader(data, qwen).close()


def test_the_limit_is_a_share_rounded_up() -> None:
    assert unreadable_limit(0.0, num_samples=1_000_000) == 0
    assert unreadable_limit(0.01, num_samples=24) == 1
    assert unreadable_limit(0.01, num_samples=200) == 2
    assert unreadable_limit(0.01, num_samples=700) == 7  # 0.01 * 700 is above 7 in floats


def test_counts_survive_the_file(tmp_path: Path) -> None:
    counts = SourceCounts(
        num_text=np.array([3, 0], np.int32),
        num_labels=np.array([1, 0], np.int32),
        num_images=np.array([0, 1], np.int32),
        image_sizes=np.array([[30, 40]], np.uint32),
        unfit={},
    )
    save_counts(counts, tmp_path / "x.npz")
    assert equal(load_counts(tmp_path / "x.npz", num_samples=2), counts)
