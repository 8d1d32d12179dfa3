# SPDX-License-Identifier: Apache-2.0
"""Text of the sbatch files: they parse, agree with each other, and hold what 16 nodes of 8 GPUs need."""

import re
import shutil
import subprocess

import pytest

from slurm.submit import STAGES
from tests.slurm.conftest import REPO

FILES = [f"slurm/{stage}.sbatch" for stage in STAGES]
SHELL_FILES = [*FILES, "slurm/env.sh", "slurm/rank.sh", "tests/slurm/toy_slurm.sh", ".ci/run"]


def directives(file: str) -> dict[str, str]:
    """The #SBATCH lines as option -> value."""
    text = (REPO / file).read_text()
    return {k: v for k, _, v in re.findall(r"^#SBATCH --([a-z-]+)(=(.*))?$", text, flags=re.M)}


@pytest.mark.parametrize("file", SHELL_FILES)
def test_shell_files_parse(file: str) -> None:
    subprocess.run(["bash", "-n", file], cwd=REPO, check=True)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (make lint brings it)")
    result = subprocess.run(["shellcheck", *SHELL_FILES], cwd=REPO, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("file", FILES)
def test_resources_are_16_nodes_of_8_gpus(file: str) -> None:
    found = directives(file)
    assert found["nodes"] == "16"
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "8"


@pytest.mark.parametrize("file", FILES)
def test_a_job_survives_its_time_limit(file: str) -> None:
    """Signal to the batch shell ahead of the limit, requeue allowed, logs kept, broken chains ended."""
    found = directives(file)
    assert found["signal"] == "B:USR2@600"
    assert found["open-mode"] == "append"
    assert found["kill-on-invalid-dep"] == "yes"
    assert "requeue" in found


@pytest.mark.parametrize("file", FILES)
def test_one_srun_line_and_no_torchrun(file: str) -> None:
    commands = [line for line in (REPO / file).read_text().splitlines() if not line.startswith("#")]
    assert sum("srun " in line for line in commands) == 1
    assert not any("torchrun" in line for line in commands)
    assert "--kill-on-bad-exit=1" in "".join(commands)
    assert "--export=ALL" in "".join(commands)  # sbatch --export=NONE binds srun, too
    assert "--wait=0" in "".join(
        commands
    )  # ranks that have ended wait for rank 0's last evaluation


def test_files_differ_in_name_recipe_and_sentence_only() -> None:
    texts = []
    for stage in STAGES:
        text = (REPO / f"slurm/{stage}.sbatch").read_text()
        assert f"RECIPE=${{RECIPE:-eve7b_{stage}}}" in text
        texts.append(re.sub(r"^# Stage .*$", "# STAGE", text.replace(stage, "STAGE"), flags=re.M))
    assert len(set(texts)) == 1


def test_every_variable_of_env_has_its_reason() -> None:
    lines = (REPO / "slurm/env.sh").read_text().splitlines()
    exports = [n for n in lines if re.match(r"export [A-Z_]+=|: \"\$\{", n)]
    assert len(exports) > 10
    assert [n for n in exports if " # " not in n.replace("  ", " ")] == []


def test_srun_hands_on_the_cores_of_a_task() -> None:
    """Since Slurm 22.05 srun does not inherit --cpus-per-task; the toy Slurm cannot show it."""
    assert "export SRUN_CPUS_PER_TASK=" in (REPO / "slurm/env.sh").read_text()
