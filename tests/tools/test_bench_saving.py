# SPDX-License-Identifier: Apache-2.0
"""The benchmark of saving counts the steps beside which a checkpoint was written. No time is asserted."""

import itertools
import json
from pathlib import Path
from unittest.mock import patch

import pytest


def measure_saving(arguments: list[str]) -> int:
    """Three steps are made while each checkpoint is written."""
    from megatron_eve.checkpoint.manager import CheckpointManager
    from tools.bench.saving import main

    polls = itertools.count(1)
    with patch.object(
        CheckpointManager, "poll", lambda self: None if next(polls) % 4 else self.wait()
    ):
        return main(arguments)


def test_steps_while_a_checkpoint_is_written(gloo1, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    small = ["--hidden", "256", "--layers", "1", "--rounds", "2", "--alone", "1"]
    assert gloo1.run(measure_saving, ["--out", str(tmp_path), *small]) == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["saving.json"], "no checkpoint stays"
    (row,) = json.loads((tmp_path / "saving.json").read_text())["rows"]
    assert [len(one["beside"]) for one in row["seconds"]] == [3, 3]
    for one in row["seconds"]:
        assert one["cost"] == pytest.approx(one["held"] + sum(one["beside"]) - 3 * one["step"])
    assert row["checkpoint_mib"] > 1


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.bench.saving import main

    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    assert asked.value.code == 0
    assert "example: python -m tools.bench.saving --out runs/bench" in capsys.readouterr().out
