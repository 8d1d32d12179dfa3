# SPDX-License-Identifier: Apache-2.0
"""tools.bench.packing: a small real run, what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from megatron_eve.config.recipes import load_recipe
from tools.bench.packing import main
from tools.bench.size_mixes import REALISTIC, STRESS, draw


def test_a_small_run_writes_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "new"), "--samples", "12000", "--repeats", "2"]
    assert main(command) == 0
    record = json.loads((tmp_path / "new" / "packing.json").read_text())
    assert record["hardware"]["cores"] and record["settings"]["samples"] == 12_000
    assert [one["sizes"] for one in record["rows"]] == [*REALISTIC, *STRESS]
    for one in record["rows"]:
        assert len(one["plan_s"]) == 2
        assert 0.9 < one["fill"] < 1
        assert 0.9 < one["balance"]["decoder"]["1"]["mean"] <= 1
        recipe = one["as_the_recipe_is"]
        assert recipe["fill"] <= recipe["fill_of_packs"]
    printed = capsys.readouterr().out
    assert ("\n" + printed).count("\n| ") == 2 * (len(record["rows"]) + 1)
    assert "| conversations, 1600^2 | 16,384 |" in printed
    assert main(command) == 2  # the older result stays
    assert "add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--repeats", "0"), ("--samples", "11999")])
def test_impossible_counts_are_refused(
    option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", "x", *option])
    assert "--samples must be at least 12,000 (a step of 4 packs" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*REALISTIC, *STRESS])
def test_mixes_keep_to_the_recipe(name: str) -> None:
    mix = {**REALISTIC, **STRESS}[name]
    data = load_recipe(mix.recipe).data
    num_vision, num_text = draw(mix, count=3000, seed=0)
    largest = 651 if data.image_edge == 800 else 2551
    assert 0.8 * largest < num_vision.max() < 1.1 * largest
    assert (num_vision == 0).mean() == pytest.approx(mix.text_only, abs=0.02)
    assert mix.text_range[0] <= num_text.min()
    assert num_text.max() <= mix.text_range[1] <= data.max_text_tokens
    assert (num_vision + num_text).max() <= data.pack_tokens - data.align
