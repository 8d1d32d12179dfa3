# SPDX-License-Identifier: Apache-2.0
"""An installed wheel: one top-level name, and the whole trip from photographs to an answer in an empty folder. The
`tools` and `slurm` that a user has there are never imported.

The environment is new and holds the wheel alone; everything else it sees through a path to the caller's packages, of
which the editable installation of the checkout is not a part (.pth files count in an environment's own folder only)."""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data as photographs
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.repo.tree import REPO, files

OWN_RECIPE = """
from dataclasses import replace

from megatron_eve.config.recipes import load_recipe


def my_run():
    base = load_recipe("eve_tiny_stage2_1")
    source = replace(base.data.sources[0], path="shards")
    return replace(
        base,
        data=replace(base.data, sources=(source,), tokenizer="tokenizer", pack_tokens=512),
        parallel=replace(base.parallel, gpus_per_node=1, tensor=1, distributed_optimizer=False),
        checkpoint=replace(base.checkpoint, load_weights_from="weights"),
        train=replace(base.train, steps=20),
    )
"""
PHOTOGRAPHS = {"astronaut": "a woman in a suit", "coffee": "a cup of coffee", "chelsea": "a cat"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the wheel is built from the unpacked sdist, the sdist from the tracked files."""
    folder = tmp_path_factory.mktemp("distributions")
    for path in files(""):
        (folder / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / path).write_bytes((REPO / path).read_bytes())
    (sdist,) = _build("sdist", folder / "tree", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (wheel,) = _build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)
    return sdist, wheel


def _build(kind: str, tree: Path, out: Path) -> list[Path]:
    code = f"from setuptools.build_meta import build_{kind} as build; build({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(out.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind]))


def test_a_wheel_has_one_top_level_name_and_every_file(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert {name.split("/")[0] for name in names} == {
        "megatron_eve",
        "megatron_eve-0.1.0.dist-info",
    }
    beside = ("data_prep/", "checkpoints_convert/", "slurm/", "tools/")
    expected = {
        f"megatron_eve/{path}" if path.startswith(beside) else path
        for path in files(".py", ".sh", ".sbatch", ".html", ".jinja", ".yaml")
        if path.startswith(("megatron_eve/", *beside))
        and not path.startswith(("tools/bench/", "tools/demo/"))
    }
    assert {name for name in names if name.startswith("megatron_eve/")} == expected


class Installed:
    """`megatron-eve` of the new environment, in a folder of a user's own."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv, self.folder = folder / "venv", folder / "work"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        self.python = venv / "bin/python"
        self.env = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        self.env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", "install"]
        subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, env=self.env)
        library = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
        (library / "packages.pth").write_text(sysconfig.get_path("purelib"))
        for name in ("tools", "slurm"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "__init__.py").write_text("raise SystemExit('not this one')\n")

    def __call__(self, *arguments: object, code: int = 0) -> str:
        command = [str(self.python.with_name("megatron-eve")), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == code, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(
    distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Installed:
    made = Installed(distributions[1], tmp_path_factory.mktemp("installed"))
    (made.folder / "images").mkdir()
    samples = []
    for number in range(24):
        name, caption = list(PHOTOGRAPHS.items())[number % 3]
        if number < 3:
            picture = Image.fromarray(getattr(photographs, name)())
            picture.resize((96, 64)).save(made.folder / f"images/{name}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        samples.append({"id": str(number), "image": f"{name}.png", "conversations": turns})
    (made.folder / "captions.json").write_text(json.dumps(samples))
    (made.folder / "my_recipes.py").write_text(OWN_RECIPE)
    return made


def test_from_photographs_to_an_answer(installed: Installed) -> None:
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, vocab_size=512)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    config = Qwen2Config(**shape, **heads, rope_theta=1e6, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).save_pretrained(installed.folder / "llm")

    installed("data", "tokenizer", "train", "captions.json", "tokenizer", "--vocab-size", 300)
    installed("data", "build-shards", "captions.json", "images", "shards")
    installed("convert", "hf-to-megatron", "llm", "weights", "--patch-embed-dim", 128)
    installed("train", "my_recipes.py:my_run", "model=from_weights")
    assert (installed.folder / "runs/my_run/latest_step").read_text().strip() == "20"
    installed("convert", "release", "runs/my_run", "release", "--license", "apache-2.0")
    asked = ("generate", "release", "--image", "images/chelsea.png", "--template", "plain")
    assert installed(*asked, "--max-new-tokens", 4)


def test_plans_jobs_and_curves_from_any_folder(installed: Installed) -> None:
    assert "eve7b_stage2_2" in installed("train", "--list")
    assert "layouts that fit" in installed("plan", "eve7b_stage1", "--cluster", "2x8xH200")
    line = installed("submit", "stage1", "--model", "my_recipes.py:eve", "--dry-run", code=2)
    assert line == ""  # the file has no function of that name: the recipe was looked for in it
    line = installed("submit", "stage1", "--model", "eve_tiny", "--dry-run").splitlines()[0]
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    (sbatch,) = (word for word in line.split() if word.endswith("/stage1.sbatch"))
    assert Path(sbatch).parent == Path(words["EVE_SLURM"])
    assert (Path(words["EVE_SLURM"]) / "env.sh").is_file()
    assert words["PYTHON"] == str(installed.python)
