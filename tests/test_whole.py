# SPDX-License-Identifier: Apache-2.0
"""What is written is whole or absent, and what stood there stays until the new stands."""

import ast
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoints_convert.new_folder import new_folder as converters_folder
from data_prep.output import new_folder as data_folder
from megatron_eve.errors import CheckpointError
from megatron_eve.whole import mend, whole_file, whole_folder, write_json, write_text
from tests.repo.tree import python_files, text_of

RENAMES_ELSEWHERE = {
    "megatron_eve/checkpoint/manager.py": "a checkpoint loses its name: broken ones step aside, old ones go",
    "tools/compare_commits.py": "trees and links in a work folder of its own, made again where a comparison stopped",
}
"""Files that rename without writing anything new, with their reason."""


def whole_over(folder: Path) -> "contextmanager[Path]":
    return whole_folder(folder)  # type: ignore[return-value]


WRITERS = {
    "whole_folder": whole_over,
    "data_prep": lambda folder: data_folder(folder, overwrite=True),
    "checkpoints_convert": lambda folder: converters_folder(folder, overwrite=True),
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that was written before."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


def left(folder: Path) -> dict[str, str]:
    """Every file beside and below the folder."""
    root = folder.parent
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, *, to: Path, call: int) -> Iterator[None]:
    """The file system refuses the `call`th rename to `to`."""
    rename, calls = os.rename, 0

    def refused(source: str | Path, target: str | Path) -> None:
        nonlocal calls
        calls += Path(target) == to
        if Path(target) == to and calls == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        yield


@pytest.mark.parametrize("writer", WRITERS)
def test_a_refused_name_leaves_the_old_folder(
    old: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write() -> None:
        with WRITERS[writer](old) as folder:
            (folder / "file").write_text("new")

    with refusing(monkeypatch, to=old, call=1), pytest.raises((OSError, CheckpointError)):
        write()
    assert left(old) == {"result/file": "old"}
    write()
    assert left(old) == {"result/file": "new"}


@pytest.mark.parametrize("writer", WRITERS)
def test_an_error_in_the_block_leaves_the_old_folder(old: Path, writer: str) -> None:
    def write() -> None:
        with WRITERS[writer](old) as folder:
            (folder / "file").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert left(old) == {"result/file": "old"}


def test_an_old_folder_that_cannot_come_back_is_named(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refused(source: str | Path, target: str | Path) -> None:
        if Path(target) == old:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with (
        pytest.raises(OSError, match=r"what it held before lies in .*\.replaced-result"),
        whole_folder(old),
    ):
        pass  # fmt: skip
    assert left(old) == {".replaced-result/file": "old"}


def test_killed_between_the_renames_the_old_folder_comes_back(old: Path) -> None:
    child = os.fork()
    if child == 0:
        rename = os.rename

        def killed(source: str | Path, target: str | Path) -> None:
            rename(source, target)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = killed  # type: ignore[assignment]
        with whole_folder(old) as folder:
            (folder / "file").write_text("new")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not old.exists()
    mend(old)
    assert (old / "file").read_text() == "old"
    with whole_folder(old) as folder:
        (folder / "file").write_text("newer")
    assert left(old) == {"result/file": "newer"}


def test_a_new_folder_is_not_replaced_by_what_was_left_aside(old: Path) -> None:
    shutil.copytree(old, old.with_name(".replaced-result"))
    (old / "file").write_text("newer")
    mend(old)
    assert (old / "file").read_text() == "newer"


def test_of_a_link_the_folder_behind_it_is_replaced(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    with whole_folder(link) as folder:
        (folder / "file").write_text("new")
    assert link.is_symlink()
    assert (old / "file").read_text() == "new"


@pytest.mark.parametrize("fails", ["write", "fsync", "rename"])
def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails != "write":
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[fails], full)

    def write() -> None:
        with whole_file(path, "wb") as file:
            file.write(b"ne")
            if fails == "write":
                full()

    with pytest.raises(OSError, match="No space left"):
        write()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "old"}


def test_json_and_shared_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "ä": 1\n}\n'
    with whole_file(tmp_path / "b", shared=True) as file:
        assert str(os.getpid()) in file.name
        file.write("x")
    assert (tmp_path / "b").read_text() == "x"


def is_rename(node: ast.AST) -> bool:
    """os.rename, os.replace, shutil.move, Path.rename; Path.replace takes one argument, str.replace two or more."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    name, owner = node.func.attr, ast.unparse(node.func.value)
    is_of_a_path = name == "replace" and len(node.args) == 1 and not node.keywords
    return (
        name == "rename"
        or (name == "move" and owner == "shutil")
        or (name == "replace" and owner == "os")
        or (is_of_a_path and owner not in ("dataclasses", "self"))
    )


def test_nothing_else_gives_results_their_name() -> None:
    found = {
        path
        for path in python_files(tests=False)
        if any(is_rename(node) for node in ast.walk(ast.parse(text_of(path))))
    }
    assert found - {"megatron_eve/whole.py"} == set(RENAMES_ELSEWHERE), "use megatron_eve/whole.py"
