# SPDX-License-Identifier: Apache-2.0
"""Damaged, missing and refusing files: the samples in them are left out or masked, counted and reported; nothing else
changes, and the plan of a run stays what it was."""

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_eve.config.schema import BatchConfig, DataConfig
from megatron_eve.data.loader import PackLoader
from megatron_eve.data.read.quarantine import Quarantined, QuarantineReport
from megatron_eve.data.read.shards import ShardTable
from megatron_eve.data.read.tokenizer import Tokenizer
from megatron_eve.data.sample import Pack, Sample
from megatron_eve.errors import DataError
from tests.data.conftest import WriteShards, data_config, make_sample
from tests.data.test_loader import digest, open_loader, run

BATCH = BatchConfig(unit="samples", size=20)
VICTIM = 7  # the sample that suffers
Damage = Callable[[Path, bytes], None]  # of a shard with the victim's text in it


def samples() -> list[Sample]:
    return [make_sample(i, sizes=[(64, 96)] if i % 3 else []) for i in range(20)]


def flip(path: Path, at: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)


def not_json(path: Path, text: bytes) -> None:
    content = path.read_bytes()
    flip(path, content.rindex(b'[{"', 0, content.index(text)), 0)


def not_utf8(path: Path, text: bytes) -> None:
    flip(path, path.read_bytes().index(b"sample-00007"), 0xFF)


def no_role(path: Path, text: bytes) -> None:
    content = path.read_bytes()
    flip(path, content.rindex(b'"from"', 0, content.index(text)) + 1, ord("g"))


def half_a_surrogate(path: Path, text: bytes) -> None:
    content = path.read_bytes()
    at = content.index(text)
    path.write_bytes(content[:at] + rb"\ud801" + content[at + 6 :])


def another_column_size(path: Path, text: bytes) -> None:
    content = path.read_bytes()
    row = 4 * (1 + VICTIM)
    begin = int(np.frombuffer(content[row : row + 4], np.uint32)[0])
    flip(path, begin + 1, 0x70)


def another_offset(path: Path, text: bytes) -> None:
    flip(path, 4 * (1 + VICTIM) + 3, 0x70)


ROW_DAMAGES: list[Damage] = [not_json, not_utf8, no_role, half_a_surrogate, another_column_size]
FILE_DAMAGES: dict[str, Damage] = {
    "missing": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "cut": lambda path, text: path.write_bytes(
        path.read_bytes()[: path.read_bytes().index(text) + 3]
    ),
}


@pytest.fixture
def shards(write_shards: WriteShards) -> Path:
    return write_shards("a", samples(), shard_bytes=1 << 20)


@pytest.fixture
def data(shards: Path, qwen_folder: Path) -> DataConfig:
    return data_config([shards], tokenizer=qwen_folder, max_unreadable=0.05)


def shard_of(shards: Path) -> Path:
    return shards / "shard.00000.mds"


TEXT = b"It is number 7."


def names(packs: list[Pack]) -> list[str]:
    return sorted(name for pack in packs for name in pack.sample_ids)


@pytest.mark.parametrize("damage", ROW_DAMAGES)
def test_a_row_damaged_before_it_is_counted_is_left_out(
    shards: Path, data: DataConfig, qwen: Tokenizer, tmp_path: Path, damage: Damage
) -> None:
    """And stays out when it is repaired: the plan of a run that was begun without it must not change."""
    whole = shard_of(shards).read_bytes()
    damage(shard_of(shards), TEXT)
    report = tmp_path / "quarantine.jsonl"
    with open_loader(data, qwen, batch=BATCH, report=report) as loader:
        assert loader.epoch_size.samples == 19
        plan, state = loader.fingerprint, loader.state_dict()
    shard_of(shards).write_bytes(whole)
    with open_loader(data, qwen, batch=BATCH, report=report) as loader:
        assert loader.fingerprint == plan
        loader.load_state_dict(state)
        packs = next(loader)
        assert "sample-00007" not in names(packs)
    (line,) = map(json.loads, report.read_text().splitlines())
    assert line["reason"] == "damaged_row"
    assert (line["file"], line["row"]) == (str(shard_of(shards)), VICTIM)
    assert f"row {VICTIM} cannot be read" in line["message"]


@pytest.mark.parametrize("damage", [*ROW_DAMAGES, another_offset, *FILE_DAMAGES.values()])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_damaged_after_it_was_counted_is_masked_in_its_place(
    shards: Path, data: DataConfig, qwen: Tokenizer, damage: Damage, num_workers: int
) -> None:
    """Same plan, same shapes, same bits of every other sample, no label of its own."""
    (whole,) = run(open_loader(data, qwen, batch=BATCH), 1)
    with PackLoaderAfter(damage, shards, data, qwen, num_workers=num_workers) as loader:
        damaged = next(loader)
    lost = {name for pack in damaged for name, _ in pack.quarantined}
    assert lost
    assert len(damaged) == len(whole)
    for found, expected in zip(damaged, whole, strict=True):
        assert found.num_vision == expected.num_vision
        assert found.cu_seqlens.tolist() == expected.cu_seqlens.tolist()
        assert found.position_ids.tolist() == expected.position_ids.tolist()
        kept = torch.ones(found.num_tokens, dtype=torch.bool)  # in sequence order
        bounds = found.cu_seqlens.tolist()
        for i, name in enumerate(found.sample_ids):
            if name in lost:
                kept[bounds[i] : bounds[i + 1]] = False
            else:
                assert name == expected.sample_ids[i]
        assert labels(found) == {at: t for at, t in labels(expected).items() if kept[at]}
        assert texts(found, kept) == texts(expected, kept)
        assert found.patches is not None
        assert len(found.patches) == int((found.vision_kind == 1).sum())


class PackLoaderAfter:
    """A loader whose shards are damaged after it was opened; patient enough for a cut file."""

    def __init__(
        self, damage: Damage, shards: Path, data: DataConfig, qwen: Tokenizer, *, num_workers: int
    ) -> None:
        config = dataclasses.replace(data, num_workers=num_workers, max_unreadable=0.99)
        self._loader = open_loader(config, qwen, batch=BATCH)
        damage(shard_of(shards), TEXT)

    def __enter__(self) -> PackLoader:
        return self._loader

    def __exit__(self, *_: object) -> None:
        self._loader.close()


def labels(pack: Pack) -> dict[int, int]:
    """Sequence position -> target."""
    at = pack.modality_order[pack.label_rows]
    return dict(zip(at.tolist(), pack.label_targets.tolist(), strict=True))


def texts(pack: Pack, kept: torch.Tensor) -> list[tuple[int, int]]:
    at = pack.modality_order[pack.num_vision :]
    return [(i, t) for i, t in zip(at.tolist(), pack.text_ids.tolist(), strict=True) if kept[i]]


def test_a_sample_that_is_another_than_was_counted_is_masked(
    shards: Path, data: DataConfig, qwen: Tokenizer
) -> None:
    loader = open_loader(data, qwen, batch=BATCH)
    content = shard_of(shards).read_bytes()
    shard_of(shards).write_bytes(content.replace(TEXT, b"I, no, I: - %7."))
    with loader:
        for epoch in range(3):
            packs = next(loader)
            masked = [q for pack in packs for q in pack.quarantined]
            assert masked == [("sample-00007", "changed_row")]
            assert loader.take_faults()["unreadable"] == (epoch == 0)  # each row once


@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_lost_files_beyond_the_limit_are_one_refusal_before_the_first_step(
    shards: Path, data: DataConfig, qwen: Tokenizer, name: str
) -> None:
    """Also where the tokens were counted before; and repaired, the same command goes on."""
    whole = shard_of(shards).read_bytes()
    for counted_before in (False, True):
        FILE_DAMAGES[name](shard_of(shards), TEXT)
        with pytest.raises(DataError, match=r"max_unreadable allows 1; .*shard\.00000") as refused:
            open_loader(data, qwen, batch=BATCH)
        assert "\n" not in str(refused.value)
        shard_of(shards).write_bytes(whole)
        if not counted_before:
            with open_loader(data, qwen, batch=BATCH) as loader:
                assert loader.epoch_size.samples == 20


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_errors_that_pass_are_only_counted(
    shards: Path,
    data: DataConfig,
    qwen: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    (whole,) = run(open_loader(data, qwen, batch=BATCH), 1)
    for path in shards.glob("lengths-*"):
        path.unlink()
    monkeypatch.setattr("megatron_eve.data.read.reading.PAUSES_S", (0.0, 0.0))
    real, calls = os.pread, [0]

    def flaky(descriptor: int, size: int, offset: int) -> bytes:
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise OSError(code, os.strerror(code))
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    with open_loader(data, qwen, batch=BATCH) as loader:
        packs = next(loader)
        assert loader.take_faults()["read_retries"] > 5
        assert loader.take_faults() == {"unreadable": 0, "read_retries": 0}
        assert not any(pack.quarantined for pack in packs)
    assert [digest(pack) for pack in packs] == [digest(pack) for pack in whole]


def test_a_file_that_cannot_be_opened_is_masked(
    shards: Path, data: DataConfig, qwen: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = open_loader(data, qwen, batch=BATCH)
    real = os.open

    def refuse(path: object, *args: int) -> int:
        if str(path).endswith(".mds"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    (packs,) = run(loader, 1)
    assert {reason for pack in packs for _, reason in pack.quarantined} == {"unreadable_file"}
    assert sum(len(pack.quarantined) for pack in packs) == 20


def test_the_report_holds_a_row_once_whoever_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    entries = [
        Quarantined(str(i), "s", "damaged_row", "cannot\nbe read é", "x.mds", i) for i in range(4)
    ]
    first, second = QuarantineReport(path), QuarantineReport(path)
    first.add(entries[:2])
    second.add(entries[1:3])
    with path.open("a") as file:
        file.write('{"id": "torn')  # of a process that was killed
    first.add(entries)
    assert second.missing(entries) == []
    QuarantineReport(path).add(entries)
    lines = path.read_text().splitlines()
    rows = [json.loads(line)["row"] for line in lines if not line.startswith('{"id": "torn')]
    assert rows == [0, 1, 2, 3]


def test_a_report_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "quarantine.jsonl"
    report = QuarantineReport(path)
    entry = Quarantined("0", "s", "damaged_row", "m", "x.mds", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        report.add([entry])
    report.add([])  # what waits is written with the next call
    assert len(path.read_text().splitlines()) == 1


def test_rows_of_a_table_have_places(shards: Path) -> None:
    table = ShardTable.open([shards])
    assert table.place(VICTIM) == (shard_of(shards), VICTIM)
    assert table.name_of(VICTIM) == "shard.00000.mds row 7"
