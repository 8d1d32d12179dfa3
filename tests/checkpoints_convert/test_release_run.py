# SPDX-License-Identifier: Apache-2.0
"""`checkpoints_convert release`: the card says what the runs recorded and nothing else, the folder is checked before it
gets its name, checksums fit."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints_convert.release import check_release
from checkpoints_convert.run_record import read_history
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import CheckpointError, DataError
from megatron_eve.evaluation.results import read_results
from tests.checkpoints_convert.test_command_line import run_main
from tests.checkpoints_convert.test_roundtrip import resave
from tests.support.reference_eve import ReferenceEve
from tests.support.tiny import layout

FullRelease = tuple[Path, ReferenceEve]
DEMO_RESULTS = {
    "rows": [{"name": "shape", "num_questions": 12, "right_image": 0.75, "majority": 0.3}]
}
LMMS_RESULTS = {
    "results": {"pope": {"alias": "pope", "pope_accuracy,none": 0.8125, "pope_accuracy_stderr,none": 0.1}},
    "n-samples": {"pope": {"original": 9000, "effective": 16}},
}  # fmt: skip


def write_run(folder: Path, recipe: str, *, weights: str, steps: int, loss: float, **data: Any) -> str:  # fmt: skip
    """config.txt and metrics.jsonl of a run; returns the configuration's text."""
    config = load_recipe(recipe)
    config = dataclasses.replace(
        config,
        run_dir=str(folder),
        checkpoint=dataclasses.replace(config.checkpoint, load_weights_from=weights or None),
        data=dataclasses.replace(config.data, **data),
    )
    folder.mkdir(parents=True)
    text = config_text(config)
    (folder / "config.txt").write_text(text)
    records = [{"step": step, "loss": loss + steps - step} for step in range(1, steps + 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return text


@pytest.fixture
def trained(gloo1: Any, full_release: FullRelease, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A stage 3 run whose checkpoint of step 5 holds the released weights, and the run that it started from."""
    imported = tmp_path / "imported"
    assert gloo1.run(run_main, "hf-to-megatron", full_release[0], imported)[0][0] == 0
    shards = tmp_path / "captions"
    shards.mkdir()
    (shards / "index.json").write_text(json.dumps({"shards": [{"samples": 30}, {"samples": 4}]}))
    before = tmp_path / "stage2_2"
    first = load_recipe("eve_tiny_stage2_2").data.sources[0]
    sources = (dataclasses.replace(first, path=str(shards), proportion=1.0, template=None),)
    write_run(
        before, "eve_tiny_stage2_2", weights=str(imported), steps=7, loss=2.5, sources=sources
    )  # type: ignore[arg-type]
    gone = (dataclasses.replace(first, path=str(tmp_path / "gone" / "questions"), template=None),)
    run = tmp_path / "stage3"
    text = write_run(
        run, "eve_tiny_stage3", weights=str(before), steps=5, loss=1.25,
        sources=gone, tokenizer=str(tokenizer_folder),
    )  # fmt: skip
    lines = (imported / "config.txt").read_text().splitlines()
    model_lines = [line for line in lines if line.startswith("model.")]
    other_lines = [line for line in text.splitlines() if not line.startswith("model.")]
    text = "\n".join(sorted([*other_lines, *model_lines])) + "\n"
    (run / "config.txt").write_text(text)
    gloo1.run(resave, imported, run / "checkpoints" / "step_00000005", layout(), text)
    return run


def test_card_holds_the_facts_of_the_runs(gloo1: Any, trained: Path, tmp_path: Path) -> None:
    for name, content in (("demo.json", DEMO_RESULTS), ("lmms.json", LMMS_RESULTS)):
        (tmp_path / name).write_text(json.dumps(content))
    out = tmp_path / "release"
    arguments = ["release", trained, out, "--license", "apache-2.0"]
    results = ["--results", tmp_path / "demo.json", "--results", tmp_path / "lmms.json"]
    code, lines, errors = gloo1.run(run_main, *arguments, *results)[0]
    assert (code, errors.count("error:")) == (0, 0), errors
    assert lines[-1].endswith(f"MB of weights, card and checksums to {out}")

    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "2 run(s), oldest first, starting from the weights `eve`." in card
    assert "| stage2_2 (`eve_tiny_stage2_2`) | 2.2 |" in card
    assert "| 9 | 0.5000 nats/token at step 9 |" in card
    # Records after the released step are not the released model's.
    assert "| 5 | 1.2500 nats/token at step 5 |" in card
    assert "| stage2_2 | captions | 34 | 1 |" in card
    assert "| stage3 | questions | not recorded |" in card
    assert "| easy-VQA: shape | exact match | 0.7500 | 12 |" in card
    assert "| pope | pope_accuracy | 0.8125 | 16 |" in card
    assert "stderr" not in card
    assert str(tmp_path) not in card

    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    assert sorted(path.name for path in tmp_path.glob("release*")) == ["release"]
    modes = {path.stat().st_mode & 0o077 for path in out.iterdir()}
    assert len(modes) == 1, "weights are as readable as the rest"


def test_without_evaluation_the_card_says_so(gloo1: Any, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    assert gloo1.run(run_main, "release", trained, out, "--dry-run")[0][0] == 0
    assert not out.exists()
    results = ("--results", tmp_path / "results.json")
    code, _, errors = gloo1.run(run_main, "release", trained, out, "--dry-run", *results)[0]
    assert (code, "results.json not found" in errors) == (1, True)
    assert gloo1.run(run_main, "release", trained, out, "--skip-check")[0][0] == 0
    card = (out / "README.md").read_text()
    assert "No evaluation was given" in card
    assert gloo1.run(run_main, "megatron-to-hf", trained, tmp_path / "converted")[0][0] == 0
    converted = (tmp_path / "converted" / "README.md").read_text()
    assert "| 5 | 1.2500 nats/token at step 5 |" in converted, "not of steps that came later"
    assert "license:" not in card
    code, _, errors = gloo1.run(run_main, "release", trained, out)[0]
    assert code == 2
    assert "release exists; choose another name or pass --overwrite" in errors
    assert gloo1.run(run_main, "release", trained, out, "--skip-check", "--overwrite")[0][0] == 0


def test_what_does_not_load_gets_no_name(full_release: FullRelease, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(full_release[0], folder)
    check_release(folder)
    state = load_file(folder / "model.safetensors")
    whole = dict(state)
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit its code: .*model\.norm\.weight"):
        check_release(folder)
    whole["model.norm.weight"][0] = float("nan")
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits of a grey image are not finite"):
        check_release(folder)
    (folder / "chat_eve.py").unlink()
    with pytest.raises(CheckpointError, match="does not load as a release"):
        check_release(folder)


def test_history_ends_where_the_records_end(trained: Path, tmp_path: Path) -> None:
    history = read_history(trained)
    assert [run.name for run in history.runs] == ["stage2_2", "stage3"]
    assert history.runs[1].last_step == 7
    assert read_history(trained / "checkpoints" / "step_00000005").runs[1].last_step == 5
    shutil.rmtree(tmp_path / "imported")
    assert read_history(trained).start == "imported"
    shutil.rmtree(tmp_path / "stage2_2")
    history = read_history(trained)
    assert ([run.name for run in history.runs], history.start) == (["stage3"], "stage2_2")
    (trained / "metrics.jsonl").unlink()
    assert read_history(trained).runs[0].last_loss is None
    assert read_history(tmp_path / "nothing").runs == ()


def test_results_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        read_results(tmp_path / "results.json")
    path = tmp_path / "results.json"
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        read_results(path)
    for text in ('{"rows": [{"name": "shape"}]}', '{"rows": [1]}', '{"results": {"pope": 1}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is no results file"):
            read_results(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not JSON"):
        read_results(path)
    path.write_text('{"accuracy": 1.0}')
    with pytest.raises(DataError, match="neither `rows`"):
        read_results(path)
