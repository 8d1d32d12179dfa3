# SPDX-License-Identifier: Apache-2.0
"""A run directory says whose it is, whatever happened to the process that said it."""

import resource
from pathlib import Path

import pytest

from megatron_eve import device  # noqa: F401  (redirects CUDA before megatron.core is imported)
from megatron_eve.config.recipes import load_recipe
from megatron_eve.config.text_form import config_text
from megatron_eve.errors import ConfigError
from megatron_eve.loop.run import claim


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run with a checkpoint that was killed, or whose disk was full, before `latest` was there."""
    claim(tmp_path / "run", load_recipe("eve_tiny_stage3"))
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    return tmp_path / "run"


def test_another_run_is_refused_without_latest(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds the checkpoints of another run: recipe was"):
        claim(run_dir, load_recipe("eve_tiny_stage1"))
    claim(run_dir, load_recipe("eve_tiny_stage3"))


def test_a_full_disk_leaves_the_configuration_as_it_was(run_dir: Path) -> None:
    """Cut short, it would be another run's, and the run could not go on when there is room again."""
    config = load_recipe("eve_tiny_stage3")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            claim(run_dir, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run_dir / "config.txt").read_text() == config_text(config)
    claim(run_dir, config)
