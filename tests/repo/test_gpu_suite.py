# SPDX-License-Identifier: Apache-2.0
"""The tests of `make gpu` on a machine without one: they import, are found, and skip with the reason."""

import re
import subprocess
import sys

import pytest
import torch

from tests.repo.tree import REPO, text_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="here they compute: make gpu")
def test_gpu_tests_are_found_and_skip_with_the_reason() -> None:
    (paths,) = re.findall(r"pytest -m gpu ([\w/. ]+?) \$\(PYTEST_ARGS\)", text_of("Makefile"))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *paths.split()], cwd=REPO, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    reasons = re.findall(r"^SKIPPED \[(\d+)\] (\S+?)(?::\d+)?: (.*)$", result.stdout, flags=re.M)
    assert {reason for _, _, reason in reasons} == {"no CUDA device"}
    files = {path for _, path, _ in reasons}
    assert files == {
        "tests/gpu/test_parity.py",
        "tests/gpu/test_training.py",
        "tests/data/test_image.py",
    }
    skipped = sum(int(count) for count, _, _ in reasons)
    assert skipped > 10 and re.search(rf"^{skipped} skipped", result.stdout, flags=re.M)
