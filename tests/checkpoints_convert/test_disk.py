# SPDX-License-Identifier: Apache-2.0
"""What a converter says it has written is on the disk."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from checkpoints_convert.disk import WriteBack
from checkpoints_convert.hf_folder import write_safetensors
from checkpoints_convert.new_folder import new_folder
from tests.support.reference_eve import ReferenceEve


class Disk:
    """Notes what is brought to the disk, and whether it had its final size by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[str, int] = {}
        self.threads: set[str] = set()
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.synced[path] = os.fstat(descriptor).st_size
        self.threads.add(threading.current_thread().name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_folder_gets_its_name_when_its_bytes_are_on_the_disk(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"weights": 3000, "config.json": 2, "code/model.py": 70}
    rename, before = os.rename, []

    def renamed(source: Path, target: Path) -> None:
        before.append(dict(disk.synced))
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    with new_folder(tmp_path / "out", overwrite=False) as partial:
        (partial / "code").mkdir()
        for name, size in names.items():
            (partial / name).write_bytes(b"x" * size)
    (synced,) = before
    partial = tmp_path / ".tmp-out"
    assert {name: synced[str(partial / name)] for name in names} == names
    assert {str(partial), str(partial / "code")} <= synced.keys()
    assert str(tmp_path) in disk.synced  # where the new name stands


def test_shards_go_to_the_disk_whole_beside_the_next_ones(
    disk: Disk, full_release: tuple[Path, ReferenceEve], tmp_path: Path
) -> None:
    write_safetensors(tmp_path, full_release[1].state_dict().items(), max_shard_bytes=40_000)
    shards = {str(path): path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 3
    assert disk.synced == shards
    assert disk.threads == {"write-back_0"}


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_the_disk_refuses_is_raised_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "shard").write_bytes(b"x")
    with pytest.raises(OSError, match=r"No space left on device: .*shard"), WriteBack() as disk:
        disk.sync(tmp_path / "shard")


def write_and_fail(path: Path) -> None:
    with WriteBack() as disk:
        disk.sync(path)
        raise ValueError("the writer's own error")


def test_an_error_in_the_block_goes_before_the_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "shard").write_bytes(b"x")
    with pytest.raises(ValueError, match="the writer's own error"):
        write_and_fail(tmp_path / "shard")


def test_a_file_system_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with new_folder(tmp_path / "out", overwrite=False) as partial:
        (partial / "weights").write_text("x")
    assert (tmp_path / "out" / "weights").read_text() == "x"
