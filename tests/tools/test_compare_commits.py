# SPDX-License-Identifier: Apache-2.0
"""The comparison of two commits: what is a difference, and that it is found wherever a commit shows it. The commands of
the commits are played by a function that writes what they would write."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tools import compare_commits

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "-c", "commit.gpgsign=false")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits that differ in a file `value` (1 and 2) and in no golden file."""
    folder = tmp_path / "repository"
    (folder / "tests/config/golden").mkdir(parents=True)
    (folder / "tests/config/golden/small.txt").write_text("a")
    subprocess.run([*GIT, "init", "-q"], cwd=folder, check=True)
    for value in ("1", "2"):
        (folder / "value").write_text(value)
        subprocess.run([*GIT, "add", "."], cwd=folder, check=True)
        subprocess.run([*GIT, "commit", "-qm", value], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


Write = Callable[[Path, str], None]


def loss(run: Path, value: str) -> None:
    """Of the second step; the first is the same in both."""
    records = [{"step": 1, "loss": 7.0, "time": 3.0}, {"step": 2, "loss": float(value)}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))


def seconds(run: Path, value: str) -> None:
    record = {"step": 1, "loss": 0.5, "time": float(value), "mfu": float(value)}
    (run / "metrics.jsonl").write_text(json.dumps(record))


def metric(run: Path, value: str) -> None:
    record = {"step": 1, "loss": 0.5} | ({"fill": 0.9} if value == "2" else {})
    (run / "metrics.jsonl").write_text(json.dumps(record))


def tensor(run: Path, value: str) -> None:
    _manifest(run, {"optimizer.exp_avg.a": {"hash": value}})


def lost_tensor(run: Path, value: str) -> None:
    _manifest(run, {"a": {}} if value == "1" else {})


def _manifest(run: Path, tensors: dict[str, dict[str, str]]) -> None:
    manifest = {"tensors": tensors, "files": {"x.distcp": run.name}, "step": 1}
    (run / "checkpoints/step_00000001/complete.json").write_text(json.dumps(manifest))


def config(run: Path, value: str) -> None:
    (run / "config.txt").write_text(f"optim.peak_lr: {value}\n")


def released(run: Path, value: str) -> None:
    (run.parents[1] / "release").mkdir(exist_ok=True)
    (run.parents[1] / "release/config.json").write_text(value)


def imported(run: Path, value: str) -> None:
    folder = run.parents[1] / "imported"
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_text(value)
    (folder / "complete.json").write_text(str(run))
    (folder / "config.txt").write_text(f"converted_from: {run.parents[1]}/release\n")


def play(monkeypatch: pytest.MonkeyPatch, write: Write) -> list[str]:
    """Every run writes the same, but for what `write` makes of the commit's value; returns the modules called."""
    called: list[str] = []

    def python(module: str, *arguments: object, code: Path, folder: Path) -> str:
        called.append(module)
        if module == "torch.distributed.run":
            run = folder / f"runs/{arguments[arguments.index('megatron_eve.train') + 1]}"
            assert (folder / "data").is_symlink() and not run.exists()
            (run / "checkpoints/step_00000001").mkdir(parents=True)
            for fact in (loss, tensor, config, released, imported):
                fact(run, "0")
            write(run, (code / "value").read_text())
        if write is resolved:
            return f"optim.peak_lr: {(code / 'value').read_text()}\n\nrun  {module}"
        return "optim.peak_lr: 0\n\nplan\n"

    monkeypatch.setattr(compare_commits, "_python", python)
    return called


def resolved(run: Path, value: str) -> None:
    """Nothing of a run: what the commit prints of a recipe differs."""


SMALL = ["HEAD~", "HEAD", "--work", "work", "--until", "stage1", "--layouts", "PP2", "one"]


@pytest.mark.parametrize(
    ("write", "line"),
    [
        (loss, "PP2 stage1: figure loss: 1 of 2 values, first 2: 1.0 -> 2.0"),
        (metric, "one text: figure fill: in HEAD alone"),
        (
            tensor,
            'one stage1: tensor optimizer.exp_avg.a of step_00000001: {"hash": "1"} -> {"hash": "2"}',
        ),
        (lost_tensor, "PP2 text: tensor a of step_00000001: in BASE alone"),
        (config, "PP2 text: field optim.peak_lr: 1 -> 2"),
        (released, "release of PP2 stage1: file release/config.json: "),
        (imported, "release of PP2 stage1: file imported/.metadata: "),
        (resolved, "recipes: field small optim.peak_lr: 1 -> 2"),
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
    assert compare_commits.main(SMALL) == 1
    printed = capsys.readouterr().out
    assert f"\n{line}" in printed
    assert re.search(rf"^{re.escape(line.partition(':')[0])} +1 differ ", printed, re.MULTILINE)
    (report,) = (repository / "work").glob("*.json")
    assert any(told.startswith(line) for told in json.loads(report.read_text())["differences"])
    rule = line.partition(":")[2].strip().partition(":")[0]
    assert compare_commits.main([*SMALL, "--allow", f"*: {rule}: *"]) == 0
    assert json.loads(report.read_text())["differences"] == []


def test_times_are_no_difference_and_records_are_kept(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = play(monkeypatch, seconds)
    assert compare_commits.main(["HEAD~", "HEAD", "--work", "work"]) == 0
    assert "0 differ" in capsys.readouterr().out
    assert called.count("torch.distributed.run") == 40
    called.clear()
    assert compare_commits.main(["HEAD~", "HEAD", "--work", "work"]) == 0
    assert compare_commits.main(SMALL[:-1]) == 0
    assert called == ["checkpoints_convert"] * 4  # a release of another run
    assert compare_commits.main([*SMALL, "--steps", "3"]) == 0
    assert called.count("torch.distributed.run") == 8


def test_a_comparison_that_was_stopped_goes_on_where_it_was(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, loss)
    whole = compare_commits._run_facts

    def stop(*arguments: Path, recipe: str, fields: Sequence[str], steps: int) -> object:
        if recipe == "stage1":
            (arguments[1] / "runs/eve_tiny_stage1").mkdir()
            raise KeyboardInterrupt
        return whole(*arguments, recipe=recipe, fields=fields, steps=steps)

    monkeypatch.setattr(compare_commits, "_run_facts", stop)
    with pytest.raises(KeyboardInterrupt):
        compare_commits.main(SMALL)
    monkeypatch.setattr(compare_commits, "_run_facts", whole)
    called = play(monkeypatch, seconds)
    assert compare_commits.main(SMALL) == 1
    assert called.count("torch.distributed.run") == 7  # all but the one that was done


def test_a_commit_is_checked_out_from_a_folder_below_the_top(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, seconds)
    monkeypatch.chdir(repository / "tests")
    assert compare_commits.main([*SMALL[:2], "--work", "work", "--until", "text"]) == 0
    assert list((repository / "tests/work").glob("code/*/value"))


def test_a_commit_that_is_none_is_wrong_usage(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_commits.main(["HEAD~", "nothing", "--work", "work"]) == 2
    assert (
        "`git rev-parse --verify nothing^{commit}` found nothing here, name a commit: fatal"
        in capsys.readouterr().err
    )


def test_a_command_runs_with_the_code_of_its_commit(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/value.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    assert compare_commits._python("value", code=tmp_path / "code", folder=tmp_path) == "1\n"
    assert (tmp_path / "log.txt").read_text() == "1\n"


def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(compare_commits.EveError, match=r"absent of code ended with 1, see .*log"):
        compare_commits._python("absent", code=tmp_path / "code", folder=tmp_path)
