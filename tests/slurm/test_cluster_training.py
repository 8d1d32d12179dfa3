# SPDX-License-Identifier: Apache-2.0
"""The real trainer under slurm/stage2_2.sbatch: two nodes, one process each, tensor and sequence parallelism over the
network between them, through the time-limit signal, a requeue and a resume."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.slurm.conftest import REPO, Cluster, saved_step, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS = 16
COLOURS = ("red", "green", "blue")


def data_prep(*args: object) -> None:
    command = [sys.executable, "-m", "data_prep", *map(str, args)]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small set of coloured pictures, sharded and with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("data")
    images, rng, samples = folder / "images", random.Random(0), []
    images.mkdir()
    for number in range(64):
        colour = rng.choice(COLOURS)
        size = (32 * rng.randint(1, 4), 32 * rng.randint(1, 4))
        Image.new("RGB", size, colour).save(images / f"{number}.png")
        turns = [("human", "<image>\nWhich colour?"), ("gpt", colour)]
        conversation = [{"from": role, "value": text} for role, text in turns]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": conversation})
    (folder / "data.json").write_text(json.dumps(samples))
    (folder / "corpus.txt").write_text("USER: Which colour? ASSISTANT: red green blue\n" * 20)
    data_prep("build-shards", folder / "data.json", images, folder / "shards", "--workers", 1)
    data_prep(
        "tokenizer", "train", folder / "corpus.txt", folder / "tokenizer", "--vocab-size", 300
    )
    return overrides_for(folder)


def overrides_for(folder: Path) -> list[str]:
    """The tiny recipe on this test's data, on two nodes of one process."""
    return [
        "data.sources=()",
        f"data.sources.0.path={folder}/shards",
        "data.sources.0.proportion=1",
        f"data.tokenizer={folder}/tokenizer",
        "parallel.num_nodes=2",
        "parallel.gpus_per_node=1",
        "parallel.sequence_parallel=true",
        "checkpoint.load_weights_from=none",
        f"train.steps={STEPS}",
        "batch.size=8",
        "logging.every_steps=1",
        "checkpoint.save_every_steps=4",
    ]


def submit(cluster: Cluster, data: list[str], run_dir: Path, log: Path) -> str:
    """The stage file as it is, with the tiny recipe on two nodes of one process."""
    if "MODE=flat" in (Path(cluster.env["TOY_SLURM_DIR"]) / "vars").read_text():
        pytest.skip("without namespaces the nodes' names do not resolve")
    argv = (
        "sbatch",
        "--parsable",
        "-N2",
        "--ntasks-per-node=1",
        f"--output={log}",
        "slurm/stage2_2.sbatch",
    )
    env = {
        "RECIPE": "eve_tiny_stage2_2",
        "RUN_DIR": str(run_dir),
        "PYTHON": sys.executable,
        "EVE_MIN_FREE_GIB": "0.1",
    }
    return cluster.run(*argv, *data, env=env).strip()


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records), "a step was recorded twice"
    return found


def evidence(run_dir: Path, log: Path) -> str:
    """Batch log and the ends of the ranks' logs."""
    ranks = [
        f"--- {path}\n{path.read_text()[-2000:]}" for path in sorted(run_dir.glob("logs/*/*.log"))
    ]
    return "\n".join([log.read_text() if log.exists() else "no batch log", *ranks])


def test_signal_requeue_resume_gives_the_losses_of_an_undisturbed_run(
    cluster: Cluster, data: list[str], tmp_path: Path
) -> None:
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    job = submit(cluster, data, calm, tmp_path / "calm.log")
    ended = cluster.wait(job, timeout_s=300)
    assert ended["JobState"] == "COMPLETED", evidence(calm, tmp_path / "calm.log")

    log = tmp_path / "disturbed.log"
    job = submit(cluster, data, disturbed, log)
    wait_until("step 4", lambda: saved_step(disturbed) >= 4, timeout_s=200)
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    ended = cluster.wait(job, timeout_s=300)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), evidence(disturbed, log)
    assert (disturbed / "DONE").exists()
    assert sorted(losses(disturbed)) == list(range(1, STEPS + 1))
    assert losses(disturbed) == losses(calm)
