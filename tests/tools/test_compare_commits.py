# SPDX-License-Identifier: Apache-2.0
"""The comparison of two commits: what is a difference, and that it is found wherever a commit shows it. The commands of
the commits are played by a function that writes what they would write."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import compare_commits

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits that differ in a file `value` (1 and 2) and in no golden file."""
    folder = tmp_path / "repository"
    (folder / "tests/golden").mkdir(parents=True)
    (folder / "tests/golden/a.txt").write_text("a")
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)
    for value in ("1", "2"):
        (folder / "value").write_text(value)
        subprocess.run([*GIT, "add", "."], cwd=folder, check=True)
        subprocess.run([*GIT, "commit", "-qm", value], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


Write = Callable[[Path, str], None]


def loss(run: Path, value: str) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float(value), "time": 3.0}))


def seconds(run: Path, value: str) -> None:
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "time": float(value)}))


def tensor(run: Path, value: str) -> None:
    manifest = {"tensors": {"optimizer.exp_avg.a": {"hash": value}}, "files": {}}
    (run / "checkpoints/step_00000001/complete.json").write_text(json.dumps(manifest))


def config(run: Path, value: str) -> None:
    (run / "config.txt").write_text(f"optim.peak_lr: {value}\n")


def converted(run: Path, value: str) -> None:
    (run.parents[1] / "hf").mkdir(exist_ok=True)
    (run.parents[1] / "hf/config.json").write_text(value)


def play(monkeypatch: pytest.MonkeyPatch, write: Write) -> list[str]:
    """Every run writes the same, but for what `write` makes of the commit's value; returns the modules called."""
    called: list[str] = []

    def python(module: str, *arguments: object, code: Path, folder: Path) -> None:
        called.append(module)
        if module == "torch.distributed.run":
            run = folder / f"runs/{arguments[arguments.index('megatron_eve.train') + 1]}"
            (run / "checkpoints/step_00000001").mkdir(parents=True, exist_ok=True)
            for fact in (loss, tensor, config, converted):
                fact(run, "0")
            write(run, (code / "value").read_text())

    monkeypatch.setattr(compare_commits, "_python", python)
    return called


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (loss, "PP2 stage3: step 1 loss: 1.0 -> 2.0"),
        (tensor, 'CP2 stage1: step_00000001 optimizer.exp_avg.a: {"hash": "1"} -> {"hash": "2"}'),
        (config, "TP2+SP text: optim.peak_lr: 1 -> 2"),
        (converted, "converted: config.json: "),
    ],
)
def test_what_differs_is_named(
    write: Write,
    line: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    play(monkeypatch, write)
    monkeypatch.setattr(compare_commits, "SHOWN", 100)
    assert compare_commits.main(["HEAD~", "HEAD", "--work", str(repository / "work")]) == 1
    assert line in capsys.readouterr().out


def test_times_are_no_difference_and_records_are_kept(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = play(monkeypatch, seconds)
    assert compare_commits.main(["HEAD~", "HEAD", "--work", str(repository / "work")]) == 0
    assert "0 differ" in capsys.readouterr().out
    assert called.count("torch.distributed.run") == 40
    called.clear()
    assert compare_commits.main(["HEAD~", "HEAD", "--work", str(repository / "work")]) == 0
    assert called == []


def test_what_one_commit_alone_has_is_a_difference() -> None:
    found = list(compare_commits.compare({"a": "1", "b": "1"}, {"b": "1", "c": "2"}))
    assert found == ["a: 1 -> absent", "c: absent -> 2"]


def test_a_commit_that_is_none_is_wrong_usage(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_commits.main(["HEAD~", "nothing", "--work", "work"]) == 2
    assert "git knows no commit 'nothing'" in capsys.readouterr().err


def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(compare_commits.EveError, match=r"absent of code ended with 1, see .*log"):
        compare_commits._python("absent", code=tmp_path / "code", folder=tmp_path)
