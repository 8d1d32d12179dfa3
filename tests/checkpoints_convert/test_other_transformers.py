# SPDX-License-Identifier: Apache-2.0
"""A release under other versions of transformers than the pinned one: what people who download it may have.

The slow test runs the release's whole tests under each (`pytest -m slow tests/checkpoints_convert`). The others hold
what broke there."""

import inspect
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from checkpoints_convert.hf.configuration_eve import EVEQwen2Config
from checkpoints_convert.hf.modeling_eve import EVEQwen2ForCausalLM
from tests.repo.tree import REPO
from tests.support.reference_eve import ReferenceEve

VERSIONS = ("4.44.2", "5.0.0", "5.23.0")  # the official EVEv2's; the first and a late one of 5
TESTS = (
    "test_modeling.py",
    "test_model_calls.py",
    "test_processor_calls.py",
    "test_release.py",
    "test_chat.py",
    "test_chat_template.py",
    "test_official_release.py",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_release_under_another_version(version: str, tmp_path: Path) -> None:
    """In an environment that has this one's packages but transformers and what that asks for."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path)], check=True)
    python = tmp_path / "bin/python"
    own = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    (Path(own.strip()) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", f"transformers=={version}"], check=True)
    code = f"import transformers; assert transformers.__version__ == {version!r}"
    subprocess.run([python, "-c", code], check=True)
    files = [str(Path("tests/checkpoints_convert") / name) for name in TESTS]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=REPO, env=os.environ | {"HF_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


def test_loaded_weights_outlive_initialisation(full_release: tuple[Path, ReferenceEve]) -> None:
    """transformers 5 initialises modules after it loaded them, with torch.nn.init's functions made to do nothing."""
    model = AutoModelForCausalLM.from_pretrained(full_release[0], trust_remote_code=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    functions = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    assert {"normal_", "ones_", "zeros_", "kaiming_uniform_"} <= set(functions)
    with patch.multiple(
        nn.init, **dict.fromkeys(functions, lambda tensor, *args, **kwargs: tensor)
    ):
        for module in model.modules():
            model._init_weights(module)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_generate_may_pass_what_either_major_version_does() -> None:
    accepted = inspect.signature(EVEQwen2ForCausalLM.prepare_inputs_for_generation).parameters
    theirs = {"cache_position", "position_ids", "next_sequence_length", "is_first_iteration"}
    assert theirs <= set(accepted)


def test_rope_theta_is_found_where_version_5_puts_it() -> None:
    def init(self: Any, *, rope_theta: float, **kwargs: Any) -> None:
        self.rope_parameters = {"rope_theta": rope_theta, "rope_type": "default"}

    with patch.object(Qwen2Config, "__init__", init):
        config = EVEQwen2Config(head_dim=8, rope_theta=1234.0)
    assert config.rope_theta == 1234.0
