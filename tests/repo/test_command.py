# SPDX-License-Identifier: Apache-2.0
"""`megatron-eve`: every command is a program that exists, and runs as `python -m` would run it."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_eve import train
from megatron_eve.__main__ import COMMANDS, main, usage
from megatron_eve.command import reports_errors
from megatron_eve.errors import CheckpointError, ConfigError, DataError, InUseError
from tests.repo.tree import REPO


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As the installed script does: without the working directory on the module path (-P)."""
    code = "import sys; from megatron_eve.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )


def test_every_command_is_a_program_that_ends_by_the_common_frame() -> None:
    for module, _ in COMMANDS.values():
        found = find_spec(module)
        if found is not None and found.submodule_search_locations:
            found = find_spec(f"{module}.__main__")
        assert found is not None and found.origin is not None, module
        assert Path(found.origin).is_relative_to(REPO)
        text = Path(found.origin).read_text()
        assert "end_with(" in text and "@reports_errors\ndef main(" in text, module


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert text == f"{usage()}\n" * 2
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_a_mistyped_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian", "eve_tiny_stage1"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_arguments_output_and_exit_code_are_the_programs(tmp_path: Path) -> None:
    """In a folder with packages of the user's own that bear our names, and without torch."""
    for name in ("slurm", "tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    shown = run("train", "eve_tiny_stage1", "train.seed=7", "--show", cwd=tmp_path)
    assert (shown.returncode, "train.seed: 7\n" in shown.stdout) == (0, True), shown.stderr
    refused = run("data", "verify", "absent", cwd=tmp_path)
    assert refused.returncode in (1, 2)
    assert "absent" in refused.stderr
    submitted = run("submit", "--help", cwd=tmp_path)
    assert (submitted.returncode, "Slurm" in submitted.stdout) == (0, True), submitted.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), 2),
        (InUseError("taken"), 1),  # a later call may find it free
        (DataError("wrong"), 1),
        (CheckpointError("wrong"), 1),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @reports_errors
    def fail() -> int:
        raise error

    assert fail() == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_defect_keeps_its_traceback() -> None:
    @reports_errors
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_under_torchrun_the_first_rank_of_a_node_tells_and_elsewhere_every_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for launcher, rank, told in (
        ("torchrun", "0", True),
        ("torchrun", "1", False),
        ("slurm", "1", True),
    ):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if launcher == "torchrun":
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
        assert train.main(["no_such_recipe"]) == 2
        assert ("no_such_recipe" in capsys.readouterr().err) is told
