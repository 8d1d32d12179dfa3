# SPDX-License-Identifier: Apache-2.0
"""tools.plot: a real picture from real files, and every refusal."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from tools.plot import load_runs, main, running_mean


def write_run(folder: Path, *, num_steps: int) -> Path:
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            loss = None if step == 2 else 3.0 / step
            record = {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "fill": 0.99}
            file.write(json.dumps(record) + "\n")
    return folder


def test_runs_follow_each_other_on_the_axis(tmp_path: Path) -> None:
    first, second = load_runs(
        [write_run(tmp_path / "a", num_steps=4), write_run(tmp_path / "b", num_steps=3)]
    )
    assert first.curve("loss") == ([1, 3, 4], [3.0, 1.0, 0.75])
    assert second.curve("lr")[0] == [5, 6, 7]
    assert first.curve("eta_s") == ([], [])
    assert (first.name, second.name) == ("a", "b")


def test_running_mean_looks_back_only() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([1.0, 3.0], window=1) == [1.0, 3.0]


def test_picture_is_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "curves.png"
    command = [
        str(write_run(tmp_path / "a", num_steps=4)),
        str(write_run(tmp_path / "b", num_steps=30)),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"curves of 2 runs written to {out}\n"
    assert main(command) == 2
    assert f"error: {out} exists; add --overwrite to replace it." in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_folder_without_metrics_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    assert "metrics.jsonl does not exist; name run folders" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    assert "metrics.jsonl holds no record" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_wrong_usage_exits_with_2_and_help_shows_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["runs/a"])
    assert wrong.value.code == 2
    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    assert asked.value.code == 0
    assert "example: python -m tools.plot runs/" in capsys.readouterr().out
