# SPDX-License-Identifier: Apache-2.0
"""The trainer as a user starts it: real processes, real shards; kill -9 and resume, stop on request, stages, errors.

Where it isn't said otherwise (`fresh`), the processes have torch imported when they start (support/warm_python.py)."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from megatron_eve.errors import ConfigError
from megatron_eve.start_checks import check_start
from megatron_eve.train import configure
from tests.support.warm_python import warm_python
from tests.training.test_run_directory import held

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 150


class Trainer:
    """A started training command. Its output goes to a file: an orphan would keep a pipe open."""

    def __init__(self, overrides: list[str], *, processes: int, recipe: str, fresh: bool) -> None:
        python = sys.executable if fresh else warm_python()
        command = [python, "-m", "megatron_eve.train", recipe, *overrides]
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            launcher = ["torch.distributed.run", "--nproc-per-node", str(processes)]
            command = [python, "-m", *launcher, "--master-port", port, *command[1:]]
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (lives as long as the trainer)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = psutil.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )

    @property
    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """kill -9 of everything that the command started."""
        if self.process.is_running():
            family = [self.process, *self.process.children(recursive=True)]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output
            with contextlib.suppress(OSError, IndexError, json.JSONDecodeError):
                if records(run_dir)[-1]["step"] >= step:
                    return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was not reached:\n{self.output}")


def start(
    overrides: list[str],
    *,
    processes: int = 1,
    recipe: str = "eve_tiny_stage3",
    fresh: bool = False,
) -> Trainer:
    """The training command of the README. `fresh`: by interpreters that have imported nothing."""
    return Trainer(overrides, processes=processes, recipe=recipe, fresh=fresh)


def train(overrides: list[str], **options) -> tuple[int, str]:  # type: ignore[no-untyped-def]
    trainer = start(overrides, **options)
    code = trainer.wait()
    return code, trainer.output


def records(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    clock = (
        "time",
        "step_time_s",
        "data_wait_s",
        "tokens_per_s_per_gpu",
        "data_wait_fraction",
        "useful_tflops_per_gpu",
        "executed_tflops_per_gpu",
        "eta_s",
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def with_run_dir(overrides: list[str], run_dir: Path) -> list[str]:
    return [*overrides, f"run_dir={run_dir}"]


def test_kill_and_resume_gives_the_same_bits(overrides, tmp_path):  # type: ignore[no-untyped-def]
    """Same losses, gradient norms and samples as an uninterrupted run, to the last bit, killed twice on the way. The
    uninterrupted one has interpreters of its own, so that nothing hangs on the seed of their hashes."""
    from megatron_eve.checkpoint.weights import weights_folder

    parallel = ["parallel.gpus_per_node=2", "parallel.tensor=2", "parallel.sequence_parallel=true"]
    overrides = [*overrides, *parallel, "data.num_workers=2"]
    code, output = train(with_run_dir(overrides, tmp_path / "whole"), processes=2, fresh=True)
    assert code == 0, output
    broken = with_run_dir(overrides, tmp_path / "broken")
    for step in (3, 7):  # before the first checkpoint, and between two
        trainer = start(broken, processes=2)
        trainer.wait_for_step(tmp_path / "broken", step)
        trainer.kill()
    code, output = train(broken, processes=2)
    assert code == 0, output
    assert "resumed from" in output
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    assert len({record["samples_checksum"] for record in records(tmp_path / "whole")}) == 12
    names = [
        sorted(p.name for p in weights_folder(tmp_path / r).glob("*.distcp"))
        for r in ("whole", "broken")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("how", ["SIGUSR2", "SIGTERM", "SIGINT", "STOP file"])
def test_stops_on_request_after_a_step_and_goes_on(overrides, tmp_path, how):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "DONE").write_text("1\n")  # of a run of fewer steps
    trainer = start([*overrides, "train.steps=4000", "checkpoint.save_every_steps=1000"])
    trainer.wait_for_step(run_dir, 2)
    if how == "STOP file":
        (run_dir / "STOP").touch()
    else:
        trainer.process.send_signal(getattr(signal, how))
    assert trainer.wait() == 0, trainer.output
    assert "stopped on request" in trainer.output
    assert not (run_dir / "DONE").exists()
    step = int((run_dir / "latest_step").read_text())
    assert records(run_dir)[-1]["step"] == step
    (run_dir / "STOP").unlink(missing_ok=True)
    code, output = train([*overrides, f"train.steps={step + 2}"])
    assert code == 0, output
    assert (run_dir / "DONE").read_text().strip() == str(step + 2)


def test_ctrl_c_under_torchrun_saves_too(overrides, tmp_path):  # type: ignore[no-untyped-def]
    """torchrun alone hears it and passes it on; its own traceback is the only one."""
    run_dir = tmp_path / "run"
    parallel = ["parallel.gpus_per_node=2", "parallel.tensor=2"]
    trainer = start([*overrides, *parallel, "train.steps=4000"], processes=2, fresh=True)
    trainer.wait_for_step(run_dir, 1)
    trainer.process.send_signal(signal.SIGINT)
    trainer.wait()
    step = int((run_dir / "latest_step").read_text())
    assert records(run_dir)[-1]["step"] == step, trainer.output
    assert trainer.output.count("Ctrl-C: the run stops after this step and saves") == 1
    assert f"stopped on request after step {step} of 4000" in trainer.output
    assert trainer.output.count("Traceback") == 1
    assert "torch/distributed/elastic" in trainer.output.split("Traceback")[1]


def test_ctrl_c_before_the_first_step_is_one_line(overrides, tmp_path):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with held(run_dir):  # the run waits for it
        trainer = start(overrides)
        deadline = time.monotonic() + TIMEOUT_S
        while "waiting 30 s for another run" not in trainer.output:
            assert time.monotonic() < deadline, trainer.output
            time.sleep(0.05)
        trainer.process.send_signal(signal.SIGINT)
        assert trainer.wait() == 130
    told = trainer.output.splitlines()[-1]
    assert told.endswith("interrupted before the first step; nothing is lost")
    assert "Traceback" not in trainer.output


def test_a_broken_newest_checkpoint_is_skipped(overrides, tmp_path):  # type: ignore[no-untyped-def]
    run_dir = tmp_path / "run"
    assert train(overrides)[0] == 0
    first = records(run_dir)
    (run_dir / "DONE").unlink()
    shard = next((run_dir / "checkpoints" / "step_00000012").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    code, output = train(overrides)
    assert code == 0, output
    assert "skipping a broken checkpoint" in output
    assert "step_00000008" in re.search(r"resumed from (\S+)", output).group(1)  # type: ignore[union-attr]
    assert records(run_dir) == first


ERRORS = {
    "data.sources.0.path=/nowhere/shards": (1, r"DataError: .*/nowhere/shards"),
    "data.tokenizer=/nowhere/tokenizer": (2, r"error: .*/nowhere/tokenizer"),
    "checkpoint.load_weights_from=/nowhere/weights": (
        1,
        r"error: no checkpoint folder /nowhere/weights",
    ),
    "parallel.gpus_per_node=2": (
        2,
        r"error: 1 processes are running but .* is 2;.*\n"
        r" +torchrun --nproc-per-node 2 -m megatron_eve.train ",
    ),
    "train.backend=te": (2, r"error: .*te"),
    "data.decode_on=gpu": (
        1,
        r"MissingHereError: data\.decode_on=gpu, but there is no GPU here",
    ),
    "data.exif_rotation=false": (
        2,
        r"error: data\.exif_rotation=false, but .*dataset\.json says",
    ),
}
"""Override -> exit code and message."""


@pytest.mark.parametrize("override", ERRORS)
def test_errors_name_the_field_or_file(overrides, override):  # type: ignore[no-untyped-def]
    expected, message = ERRORS[override]
    code, output = train([*overrides, override])
    assert code == expected, output[-2000:]
    assert re.search(message, output), output[-2000:]
    assert "Traceback" not in output


def test_dry_run_touches_no_device() -> None:
    """Torch is not even imported."""
    code = (
        "import sys; from megatron_eve.train import main; "
        "code = main(['eve7b_stage2_2', '--dry-run']); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "14,156,712,960" in done.stdout
    assert "128 = 16 nodes x 8" in done.stdout


def test_wrong_key_and_impossible_layout_are_refused() -> None:
    for override, message in (
        ("optim.peak_learning_rate=1", "peak_lr"),
        ("parallel.tensor=3", "parallel.tensor=3"),
    ):
        code, output = train([override, "--dry-run"], recipe="eve7b_stage2_2")
        assert code == 2
        assert message in output
        assert "Traceback" not in output


def test_a_run_directory_of_another_stage_is_refused(overrides, tmp_path):  # type: ignore[no-untyped-def]
    code, output = train([*overrides, "train.steps=4"])
    assert code == 0, output
    before = (tmp_path / "run" / "config.txt").read_text()
    code, output = train([*overrides, "train.steps=8"], recipe="eve_tiny_stage2_2")
    assert code == 2
    assert "holds the checkpoints of another run" in output
    assert "stage.name was 3, is 2.2" in output
    assert (tmp_path / "run" / "config.txt").read_text() == before
    other = _with_two_words_exchanged(overrides, tmp_path / "tokenizer")
    load = [f"checkpoint.load_weights_from={tmp_path / 'run'}", f"run_dir={tmp_path / 'next'}"]
    for start in ([], load):  # to resume, and to start from its weights
        same = [*overrides, *start]
        check_start(configure("eve_tiny_stage3", overrides=same), dry_run=False)
        with pytest.raises(ConfigError, match="tokenizer is not the one of the weights"):
            check_start(configure("eve_tiny_stage3", overrides=[*same, other]), dry_run=False)


def _with_two_words_exchanged(overrides: list[str], folder: Path) -> str:
    """An override for the run's tokenizer with two rows of the embedding exchanged; every length stays."""
    source = next(o for o in overrides if o.startswith("data.tokenizer=")).partition("=")[2]
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return f"data.tokenizer={folder}"


def test_a_second_run_waits_for_the_first_ones_end(overrides, tmp_path):  # type: ignore[no-untyped-def]
    """As after a requeue, when a process of before is not quite dead."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with held(run_dir) as holder:
        trainer = start([*overrides, "train.steps=1"])
        said = f"waiting 30 s for another run in {run_dir}: process {holder.pid} on "
        deadline = time.monotonic() + TIMEOUT_S
        while said not in trainer.output:
            assert trainer.process.poll() is None, trainer.output
            assert time.monotonic() < deadline, trainer.output
            time.sleep(0.05)
        assert not (run_dir / "config.txt").exists()
        holder.kill()
        assert trainer.wait() == 0, trainer.output
    assert (run_dir / "DONE").exists()


def test_context_parallel_run_resumes_without_it(overrides, tmp_path):  # type: ignore[no-untyped-def]
    """Two processes share every sample; one process goes on from their checkpoint with the same losses and samples."""
    run_dir = tmp_path / "run"
    overrides = [*overrides, "train.dtype=fp32", "data.sample_align=4"]
    parallel = ["parallel.gpus_per_node=2", "parallel.context=2"]
    code, output = train([*overrides, *parallel], processes=2)
    assert code == 0, output
    whole = records(run_dir)
    assert len(whole) == 12
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000012")
    code, output = train(overrides)
    assert code == 0, output
    assert re.search(r"resumed from \S+step_00000008", output)
    for again, before in zip(records(run_dir), whole, strict=True):
        assert again["loss"] == pytest.approx(before["loss"], rel=1e-6), again["step"]
        assert again["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-5), again["step"]
        assert again["samples_checksum"] == before["samples_checksum"]
