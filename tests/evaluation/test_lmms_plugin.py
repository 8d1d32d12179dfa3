# SPDX-License-Identifier: Apache-2.0
"""lmms-eval itself with our plugin, on local data: its scores are our evaluator's, its multiple choice our likelihoods.

Needs lmms-eval (`make test` installs it); without it only the files that it reads are checked."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.tokenizer import train_bpe
from megatron_eve.errors import ConfigError
from megatron_eve.evaluation.easy_vqa import main as evaluate
from megatron_eve.evaluation.lmms_eval.__main__ import _parse, command_line, main
from megatron_eve.evaluation.lmms_eval.asking import Asked, AskSettings, Decoding, ReleasedFolder
from megatron_eve.evaluation.lmms_eval.models import AVAILABLE_MODELS
from megatron_eve.evaluation.lmms_eval.tasks.easy_vqa import questions
from megatron_eve.evaluation.scoring import GROUPS
from tests.checkpoints_convert.conftest import CORPUS, release_model, write_reference_release
from tests.repo.tree import REPO, text_of
from tests.support.reference_eve import build_reference
from tests.support.tiny import ALL

TASKS = "megatron_eve/evaluation/lmms_eval/tasks"
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed; `make install-eval` does it",
)
CHOICES = ["red", "a blue square", "two shapes"]
TWO_IMAGES = """
task: two_images
dataset_path: json
dataset_kwargs:
  data_files:
    test: two.json
test_split: test
output_type: {kind}
doc_to_visual: !function local.images
doc_to_text: question
doc_to_target: answer
{rest}
metadata:
  version: 1.0
"""
LOCAL = '''
"""Functions of the two tasks."""
from pathlib import Path
from PIL import Image

def images(record):
    return [Image.open(name).convert("RGB") for name in record["images"]]

def results(record, answers):
    Path("answers.txt").open("a").write(answers[0] + chr(10))
    return {"right": 1.0}
'''


def noise(path: Path, seed: int, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder and data laid out as `make demo` does, on which a random model is sometimes right."""
    base = tmp_path_factory.mktemp("lmms")
    train_bpe(CORPUS * 3, base / "bpe", 320)
    eve = build_reference(release_model(ALL, base / "bpe"), seed=4)
    folder = write_reference_release(base / "eve", eve, base / "bpe")
    easy_vqa = base / questions.EASY_VQA
    texts = {"shape": "What shape?", "color": "What colour is the circle?", "yes/no": "Is it red?"}
    records = []
    for number in range(6):
        image = f"images/test/{number}.png"
        noise(easy_vqa / image, number, 8 + 4 * (number % 3), 8)
        records += [
            {"id": f"{number}-{kind}", "image": image, "question": text, "type": kind, "answer": "?"}
            for kind, text in texts.items()
        ]  # fmt: skip
    asked = [
        Asked(text=record["question"], load_images=lambda r=record: [Image.open(easy_vqa / r["image"])])
        for record in records
    ]  # fmt: skip
    released = ReleasedFolder(folder, AskSettings(resize_rule="train"), device="cpu")
    for number, record in enumerate(records):
        (_, answer), *_ = released.answers([asked[number]], decoding_of_task())
        record["answer"] = answer.upper() if number % 3 else "another"
    (easy_vqa / "questions_test.json").write_text(json.dumps(records))
    turns = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]
    training = json.dumps([{"conversations": turns}])
    (easy_vqa / "questions_train.json").write_text(training)
    return base


def decoding_of_task() -> Decoding:
    return Decoding(max_new_tokens=4)


def lmms_eval(
    folder: Path, tasks: str, *options: str, further: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Run it in `folder`; returns its results file's content."""
    environment = os.environ | {
        "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hf-home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-W", "ignore", "-m", "megatron_eve.evaluation.lmms_eval", "eve", "--resize-rule", "train",
        "--tasks", tasks, "--out", f"out-{tasks}", *options, "--", *further,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    (path,) = (folder / f"out-{tasks}").rglob("*_results.json")
    assert str(path.relative_to(folder)) in done.stdout.splitlines()[-1]
    return json.loads(path.read_text())


@needs_lmms_eval
def test_score_is_our_own_evaluators(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer, and so every score; lmms-eval in batches of 4, ours in one."""
    content = lmms_eval(workplace, "easy_vqa", "--batch-size", "4")
    monkeypatch.chdir(workplace)
    assert evaluate(["eve", str(questions.EASY_VQA), "own"]) == 0
    rows = {row["name"]: row for row in json.loads(Path("own/results.json").read_text())["rows"]}
    found = content["results"]["easy_vqa"]
    assert set(rows) == set(GROUPS)
    for group, metric in questions.METRICS.items():
        assert found[f"{metric},none"] == pytest.approx(rows[group]["right_image"], abs=1e-12)
    assert 0 < found["open,none"] < 1
    (path,) = Path("out-easy_vqa").rglob("*_samples_easy_vqa.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    theirs = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    own = [
        json.loads(line)["answer"] for line in Path("own/answers.jsonl").read_text().splitlines()
    ]
    assert [theirs[number] for number in range(len(own))] == own


@needs_lmms_eval
@pytest.mark.parametrize("kind", ["multiple_choice", "generate_until"])
def test_two_images_a_question(workplace: Path, kind: str) -> None:
    """Likelihoods choose the continuation that our own likelihoods choose; answers are our own answers."""
    include = workplace / kind
    include.mkdir()
    records = [
        {"images": [f"pair/{n}.png", f"pair/{n + 1}.png"], "question": q, "answer": 0}
        for n, q in ((0, "Which is red?"), (1, "Is <image> above <image>?"))
    ]
    for number in range(3):
        noise(workplace / f"pair/{number}.png", 9 + number, 8, 4 * (1 + number))
    released = ReleasedFolder(workplace / "eve", AskSettings(resize_rule="train"), device="cpu")
    asked = [
        Asked(text=r["question"], load_images=lambda r=r: [Image.open(workplace / i) for i in r["images"]])  # type: ignore[misc]
        for r in records
    ]  # fmt: skip
    best = [
        max(range(3), key=lambda c: next(iter(released.likelihoods([one], [CHOICES[c]])))[1].log_probability)
        for one in asked
    ]  # fmt: skip
    for record, choice in zip(records, [best[0], (best[1] + 1) % 3], strict=True):
        record["answer"] = choice
    (workplace / "two.json").write_text(json.dumps(records))
    (include / "local.py").write_text(LOCAL)
    rest = {
        "multiple_choice": f"doc_to_choice: {json.dumps(CHOICES)}\nmetric_list:\n  - metric: acc\n"
        "    aggregation: mean\n    higher_is_better: true",
        "generate_until": "generation_kwargs:\n  max_new_tokens: 4\nprocess_results: !function local.results\n"
        "metric_list:\n  - metric: right\n    aggregation: mean\n    higher_is_better: true",
    }[kind]
    task = TWO_IMAGES.format(kind=kind, rest=rest).replace("two_images", kind + "_task")
    (include / "task.yaml").write_text(task)
    content = lmms_eval(
        workplace, kind + "_task", "--batch-size", "2", further=("--include_path", str(include))
    )
    if kind == "multiple_choice":
        assert (
            content["results"][kind + "_task"]["acc,none"] == 0.5
        )  # the first right, the second not
    else:
        own = [next(iter(released.answers([one], decoding_of_task())))[1] for one in asked]
        assert sorted((workplace / "answers.txt").read_text().splitlines()) == sorted(own)


def test_command_line_names_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = _parse(["eve", "--tasks", "pope", "--out", "o", "--repetition-penalty", "1.05"])
    command = command_line(arguments, further=["--limit", "3"])
    options = command[command.index("--model_args") + 1]
    assert (
        options
        == "pretrained=eve,resize_rule=eval,repetition_penalty=1.05,template=qwen2,dtype=auto"
    )
    assert command[-2:] == ["--limit", "3"]
    assert Path(command[command.index("--include_path") + 1]).name == "tasks"
    with pytest.raises(SystemExit, match="2"):
        main(["eve", "--tasks", "pope"])
    assert "--out" in capfd.readouterr().err


def test_missing_lmms_eval_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eve", "--tasks", "pope", "--out", "o"]) == 2
    assert "lmms-eval is not installed; `make install-eval`" in capsys.readouterr().err


@needs_lmms_eval
def test_no_results_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """lmms-eval itself exits 0 after an error."""
    out = str(tmp_path / "out")
    assert main([str(tmp_path / "nothing"), "--tasks", "easy_vqa", "--out", out]) == 1
    assert "wrote no results" in capfd.readouterr().err


@needs_lmms_eval
def test_what_a_task_asks_for_and_the_model_does_not_do_is_refused() -> None:
    """Decoding that would be ignored, several rounds, and what is no image."""
    from megatron_eve.evaluation.lmms_eval.models.eve import Eve, decoding

    greedy = {
        "max_new_tokens": 9,
        "temperature": 0.2,
        "top_p": 0.5,
        "do_sample": False,
        "until": "Q:",
    }
    assert decoding(greedy) == Decoding(max_new_tokens=9, until=("Q:",))
    sampled = decoding({"temperature": 0.2, "top_p": 0.5, "num_beams": 2, "until": ["a", "b"]})
    assert sampled == Decoding(until=("a", "b"), temperature=0.2, top_p=0.5, num_beams=2)
    with pytest.raises(ConfigError, match=r"generation_kwargs \['top_k'\] are not known; use do_s"):
        decoding({"top_k": 5})
    model = Eve.__new__(Eve)
    with pytest.raises(ConfigError, match=r"2 requests are of several rounds\. Leave the task out"):
        model.generate_until_multi_round([None, None])
    model.task_dict = {"films": {"test": ["record"]}}
    asked = model._asked(("What happens?", {}, lambda record: ["film.mp4"], 0, "films", "test"))
    with pytest.raises(ConfigError, match="task films gives str; model eve reads PIL images only"):
        asked.load_images()


def test_plugin_has_the_layout_that_lmms_eval_reads() -> None:
    for name, class_name in AVAILABLE_MODELS.items():
        source = text_of(f"megatron_eve/evaluation/lmms_eval/models/{name}.py")
        assert f"\nclass {class_name}(lmms):" in source
    assert "megatron_eve.evaluation.lmms_eval" in text_of("docs/evaluation.md")


def test_task_scores_as_our_evaluator() -> None:
    record = {"answer": "Red", "type": "color"}
    assert questions.results(record, [" red\n"]) == {"color": 1.0, "open": 1.0}
    assert questions.results(record, ["blue"]) == {"color": 0.0, "open": 0.0}
    assert questions.results({"answer": "yes", "type": "yes/no"}, ["yes"]) == {"yes_no": 1.0}
    assert set(questions.METRICS) == set(GROUPS)
    yaml = text_of(f"{TASKS}/easy_vqa/easy_vqa.yaml")
    assert {f"metric: {name}\n" in yaml for name in questions.METRICS.values()} == {True}
    assert f"test: {questions.EASY_VQA}/questions_test.json\n" in yaml
    assert questions.share([1.0, 0.0, 1.0, 1.0]) == 0.75
