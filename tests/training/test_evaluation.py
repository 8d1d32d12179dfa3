# SPDX-License-Identifier: Apache-2.0
"""Evaluation beside the training: no step waits for it, its numbers arrive, its budget is kept, all is counted."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megatron_eve.config.overrides import apply_overrides
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.resolve import resolve
from megatron_eve.config.schema import EvaluationConfig
from megatron_eve.config.text_form import config_from_text, config_text
from megatron_eve.errors import ConfigError
from megatron_eve.metrics.sinks import read_metrics
from megatron_eve.training.evaluation import Evaluations, read_result
from tests.training.test_run import train

PLACES = "{checkpoint} {out} {step}"
WRITE = "import json, pathlib, sys; out = pathlib.Path(sys.argv[2]); "
# A result that appears only when the run went on by two steps: a trainer that waited for it would wait for its own end.
AFTER_TWO_MORE_STEPS = """
import json, pathlib, sys, time
checkpoint, out, step = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
assert (checkpoint / "config.txt").is_file()
records = out.parents[1] / "metrics.jsonl"
def is_later():
    lines = records.read_text().splitlines()
    return any(json.loads(line)["step"] >= step + 2 for line in lines)
while not is_later() and not (out.parents[1] / "DONE").exists():
    time.sleep(0.01)
(out / "metrics.json").write_text(json.dumps(dict(right=step / 100)))
"""


def python(code: str) -> str:
    """A command that runs `code` with the places as arguments."""
    return f"{sys.executable} -c {shlex.quote(code.replace('{', '{{').replace('}', '}}'))} {PLACES}"


def evaluations(run_dir: Path, code: str, **fields: Any) -> Evaluations:
    config = EvaluationConfig(command=python(code), **fields)
    return Evaluations(config, run_dir=run_dir, is_starter=True)


def publish(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def until_news(found: Evaluations) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found.poll()
        if news := found.news():
            return news
        time.sleep(0.01)
    raise AssertionError("nothing came within a minute")


def test_result_goes_into_the_next_record(tmp_path: Path) -> None:
    found = evaluations(tmp_path, WRITE + "(out / 'metrics.json').write_text('{\"right\": 0.5}')")
    found.saved(4)
    found.poll()
    assert not (tmp_path / "evaluations").exists(), "not before the checkpoint is published"
    publish(tmp_path, 4)
    news = until_news(found)
    assert news == {"evaluated_step": 4.0, "evaluation/right": 0.5, "evaluations_unfinished": 0.0}
    assert found.news() == {}
    (record,) = records(tmp_path)
    assert (record["step"], record["outcome"], record["metrics"]) == (4, "done", {"right": 0.5})


def ends(pid: int) -> bool:
    """Whether the process is gone, or a corpse that init has not buried, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_over_budget_is_killed_and_counted(tmp_path: Path) -> None:
    """The command notes its process and ignores a polite end."""
    code = "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[2] + '/pid', 'w')"
    code += ".write(str(os.getpid())); time.sleep(1000)"
    found = evaluations(tmp_path, code, timeout_s=1)
    publish(tmp_path, 1)
    found.saved(1)
    assert until_news(found) == {"evaluations_unfinished": 1.0}
    assert records(tmp_path)[0]["outcome"] == "over budget"
    pid = int((tmp_path / "evaluations/step_00000001/pid").read_text())
    assert ends(pid)


TRAINER_THAT_DIES = """
import os, pathlib, sys, time
from megatron_eve.config.schema import EvaluationConfig
from megatron_eve.training.evaluation import Evaluations
run_dir = pathlib.Path(sys.argv[1])
config = EvaluationConfig(command=sys.argv[2], timeout_s=4)
found = Evaluations(config, run_dir=run_dir, is_starter=True)
found.saved(1)
found.poll()
while not (run_dir / "evaluations/step_00000001/pid").exists():
    time.sleep(0.01)
os._exit(9)
"""


def test_the_budget_is_kept_when_the_trainer_is_gone(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    note = "echo $$ > $0/part && mv $0/part $0/pid && exec sleep 1000"  # a shell starts within the budget
    command = f"sh -c '{note}' {{out}} {{checkpoint}}"
    trainer = [sys.executable, "-c", TRAINER_THAT_DIES, str(tmp_path), command]
    assert subprocess.run(trainer, timeout=60).returncode == 9
    assert ends(int((tmp_path / "evaluations/step_00000001/pid").read_text()))


@pytest.mark.parametrize(
    "code",
    ["raise SystemExit(3)", "pass", WRITE + "(out / 'metrics.json').write_text('{\"a\": \"b\"}')"],
    ids=["fails", "writes nothing", "writes no numbers"],
)
def test_a_command_without_result_has_failed(tmp_path: Path, code: str) -> None:
    found = evaluations(tmp_path, code)
    publish(tmp_path, 1)
    found.saved(1)
    assert until_news(found) == {"evaluations_unfinished": 1.0}
    assert records(tmp_path)[0]["outcome"] == "failed"


def test_a_missing_program_does_not_end_the_run(tmp_path: Path) -> None:
    config = EvaluationConfig(command="no-such-program {checkpoint} {out}")
    found = Evaluations(config, run_dir=tmp_path, is_starter=True)
    publish(tmp_path, 1)
    found.saved(1)
    assert until_news(found) == {"evaluations_unfinished": 1.0}


def test_never_two_at_once(tmp_path: Path) -> None:
    found = evaluations(tmp_path, "import time; time.sleep(1000)")
    for step in (1, 2):
        publish(tmp_path, step)
        found.saved(step)
        found.poll()
    assert [(r["step"], r["outcome"]) for r in records(tmp_path)] == [(2, "skipped")]
    found.close()
    assert [(r["step"], r["outcome"]) for r in records(tmp_path)][1:] == [(1, "stopped")]
    assert found.news() == {"evaluations_unfinished": 2.0}
    found.close()


def test_end_of_a_run_waits_unless_asked_to_stop(tmp_path: Path) -> None:
    found = evaluations(tmp_path, WRITE + "(out / 'metrics.json').write_text('{\"right\": 1}')")
    publish(tmp_path, 1)
    found.saved(1)
    found.finish(give_up=lambda: False)
    assert records(tmp_path)[-1]["outcome"] == "done"
    publish(tmp_path, 2)
    found.saved(2)
    found.finish(give_up=lambda: True)
    assert records(tmp_path)[-1]["outcome"] == "stopped"


def killed_while_it_evaluates(run_dir: Path) -> Path:
    """What SIGKILL leaves: the command's folder, no record. The command may still be writing to the folder."""
    found = evaluations(run_dir, "import time; time.sleep(1000)")
    publish(run_dir, 4)
    found.saved(4)
    found.poll()
    assert found._running is not None
    found._running.process.kill()
    found._running.process.wait()
    return run_dir / "evaluations/step_00000004"


def test_what_a_kill_interrupted_is_evaluated_when_the_run_goes_on(tmp_path: Path) -> None:
    interrupted = killed_while_it_evaluates(tmp_path)
    found = evaluations(tmp_path, WRITE + "(out / 'metrics.json').write_text('{\"right\": 0.5}')")
    publish(tmp_path, 6)  # not what the run goes on from
    found.resumed(5)
    assert until_news(found)["evaluated_step"] == 4.0
    assert not (interrupted / "metrics.json").exists(), "nobody else's folder is written to"
    assert (tmp_path / "evaluations/step_00000004.2/metrics.json").exists()
    (tmp_path / "evaluations.jsonl").open("a").write('{"step": 6, "outc')  # cut off by a kill
    found.resumed(5)
    found.finish(give_up=lambda: False)
    assert [(r["step"], r["outcome"]) for r in records_but_the_last(tmp_path)] == [(4, "done")]


def records_but_the_last(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(
    ("outcome", "again"),
    [("done", False), ("failed", False), ("over budget", False), ("stopped", True)],
)
def test_only_what_was_stopped_is_due_again(tmp_path: Path, outcome: str, again: bool) -> None:
    publish(tmp_path, 4)
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 4, "outcome": outcome}) + "\n")
    found = evaluations(tmp_path, WRITE + "(out / 'metrics.json').write_text('{\"right\": 1}')")
    found.resumed(4)
    found.finish(give_up=lambda: False)
    assert ("evaluation/right" in found.news()) == again


def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    (tmp_path / "evaluations").write_text("no folder can be made here")
    found = evaluations(tmp_path, "pass")
    found.saved(1)
    assert until_news(found) == {"evaluations_unfinished": 1.0}
    assert records(tmp_path)[0]["outcome"] == "failed"


def test_a_record_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, 1)
    (tmp_path / "evaluations.jsonl").mkdir()
    found = evaluations(tmp_path, WRITE + "(out / 'metrics.json').write_text('{\"score\": 2}')")
    found.saved(1)
    assert until_news(found)["evaluation/score"] == 2.0
    assert "evaluation of step 1 is not in evaluations.jsonl: " in caplog.text


def test_steps_and_ranks_that_evaluate(tmp_path: Path) -> None:
    found = evaluations(tmp_path, "pass", every_steps=4)
    other = Evaluations(EvaluationConfig(command="x"), run_dir=tmp_path, is_starter=False)
    off = Evaluations(EvaluationConfig(), run_dir=tmp_path, is_starter=True)
    publish(tmp_path, 2)
    for one in (found, other, off):
        one.saved(2)
        one.resumed(2)
        one.poll()
        one.finish(give_up=lambda: False)
        assert one.news() == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


def test_the_command_is_no_rank_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    code = WRITE + "import os; e = os.environ; (out / 'metrics.json').write_text(json.dumps(dict("
    code += (
        "ranks=sum(k in e for k in ('RANK', 'MASTER_ADDR')), gpus=len(e['CUDA_VISIBLE_DEVICES']))))"
    )
    found = evaluations(tmp_path, code)
    publish(tmp_path, 1)
    found.saved(1)
    news = until_news(found)
    assert (news["evaluation/ranks"], news["evaluation/gpus"]) == (0.0, 0.0)


def test_result_is_a_flat_object_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert read_result(path) is None
    for text in ("", "[1]", "{}", '{"a": null}', '{"a": NaN}', '{"a": true}', '{"a": 1, "b": {}}'):
        path.write_text(text)
        assert read_result(path) is None, text
    path.write_text('{"a": 1, "b": 0.5}')
    assert read_result(path) == {"a": 1.0, "b": 0.5}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.command=x {checkpoint} {out}", "evaluation.every_steps=3"],
         r"every_steps=3 is not a multiple of checkpoint\.save_every_steps=200"),
        (["evaluation.command=x {checkpoint}"], r"has no \{out\}"),
        (["evaluation.command=x {checkpoint} {out} {rank}"], r"holds \{rank\}; it can hold \{checkpoint\}"),
        (["evaluation.command=x '{checkpoint} {out}"], "No closing quotation"),
        (["evaluation.command=x {checkpoint} {out"], "cannot be read"),
        (["evaluation.timeout_s=0"], r"evaluation\.timeout_s=0 is below 1"),
    ],
)  # fmt: skip
def test_refusal_says_what_and_why(overrides: list[str], message: str) -> None:
    config = apply_overrides(load_recipe("eve_tiny_stage3"), overrides)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_configurations_from_before_have_none() -> None:
    text = config_text(load_recipe("eve_tiny_stage3"))
    older = "".join(f"{line}\n" for line in text.splitlines() if not line.startswith("evaluation."))
    assert config_from_text(older) == load_recipe("eve_tiny_stage3")


def test_training_goes_on_beside_it(overrides: list[str], tmp_path: Path) -> None:
    """The result of step 10 needs the records of steps 11 and 12, so no step waits for it."""
    command = python(AFTER_TWO_MORE_STEPS)
    extra = ["train.steps=30", "checkpoint.save_every_steps=10", f"evaluation.command={command}"]
    code, output = train([*overrides, *extra, "evaluation.timeout_s=60"])
    assert code == 0, output
    run_dir = tmp_path / "run"
    outcomes = {r["step"]: r["outcome"] for r in records(run_dir)}
    assert (outcomes[10], outcomes[30]) == ("done", "done")
    logged = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in logged] == list(range(1, 31))
    told = next(record for record in logged if record.get("evaluated_step") == 10)
    assert told["evaluation/right"] == 0.1
    assert (told["step"] or 0) > 12
    assert "evaluation of step 10 done" in output
    assert (run_dir / "DONE").exists()


@pytest.mark.parametrize("method", ["resumed", "saved", "poll", "finish", "close"])
def test_whatever_goes_wrong_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    found = evaluations(tmp_path, "pass")
    publish(tmp_path, 4)

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise ValueError("a record that nobody can read")

    for inside in ("_settled", "_is_chosen", "_checkpoint", "_record", "_start"):
        monkeypatch.setattr(found, inside, fail)
    found._due = 4
    found._running = SimpleNamespace(process=None, step=4) if method == "close" else None  # type: ignore[assignment]
    keywords: dict[str, Any] = {"give_up": lambda: False} if method == "finish" else {}
    getattr(found, method)(*[4] * (method in ("resumed", "saved")), **keywords)
    assert caplog.messages[-1].startswith("evaluations end with this one: ")
    assert caplog.messages[-1].endswith("; the run goes on")
    found.saved(8)
    found.poll()
    assert not (tmp_path / "evaluations").exists()
