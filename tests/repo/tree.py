# SPDX-License-Identifier: Apache-2.0
"""The files of the repository, for the tests that look at them as text."""

import re
import subprocess
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron_eve", "data_prep", "checkpoints_convert", "tools", "slurm")


@cache
def files(*suffixes: str) -> tuple[str, ...]:
    """Paths of the checkout's tracked files with these suffixes, relative to its root, sorted."""
    result = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if result.returncode == 0:
        paths = result.stdout.splitlines()
    else:  # an unpacked source archive
        skipped = (".venv", "build", "runs", "data", "logs")
        found = (p.relative_to(REPO) for p in REPO.rglob("*") if p.is_file())
        paths = [
            str(p) for p in found if p.parts[0] not in skipped and "__pycache__" not in p.parts
        ]
    return tuple(sorted(p for p in paths if p.endswith(suffixes) and (REPO / p).exists()))


def python_files(*, tests: bool) -> list[str]:
    """Python files of the packages, with those of tests/ if asked for."""
    return [p for p in files(".py") if tests or not p.startswith("tests/")]


def text_of(path: str) -> str:
    return (REPO / path).read_text(encoding="utf-8")


def documents() -> list[str]:
    """README and the files of docs/."""
    return ["README.md", *(p for p in files(".md") if p.startswith("docs/"))]


def commands(document: str) -> list[str]:
    """Command lines in the shell blocks of a document; continued lines are joined, comments and output left out."""
    found: list[str] = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text_of(document), flags=re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s+#\s.*$", "", line).strip()
            if line and not line.startswith("#"):
                found.append(re.sub(r"\s+", " ", line))
    return found
