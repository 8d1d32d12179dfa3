# SPDX-License-Identifier: Apache-2.0
"""A writing process that comes to a standstill does not take the run with it."""

import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_eve.checkpoint import writer
from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.checkpoint.manifest import check_folder
from megatron_eve.checkpoint.verify import verify_folder
from megatron_eve.checkpoint.writer import _ShardWriter
from tests.checkpoint.test_faults import DP2, assemble, change, folder


def save_with_a_writer_that_hangs(run_dir: Path, when: str) -> tuple[int, list[str]]:
    """`when`: before it writes, or after it has told what it wrote. Step of the checkpoint, and what the log says."""
    parent, write = os.getpid(), _ShardWriter.write

    def hang(self: _ShardWriter) -> Any:
        if os.getpid() != parent and torch.distributed.get_rank() == 1:
            if when == "before":
                time.sleep(1000)
            threading.Thread(target=time.sleep, args=(1000,)).start()  # its process waits for it
        return write(self)

    training = assemble(DP2)
    manager = CheckpointManager(run_dir, keep_last=9, config_text="", in_background=True)
    change(training)
    said: list[str] = []
    with (
        patch.object(_ShardWriter, "write", hang),
        patch.multiple(writer, _LOOK_S=0.05, _HANGS_AFTER_S=0.5),
        patch.object(writer._LOG, "warning", lambda text, *values: said.append(text % values)),
    ):
        manager.save(training, step=4, data={"step": 4})
        manager.wait()
    verify_folder(folder(run_dir, 4))
    return check_folder(folder(run_dir, 4))["step"], said


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_that_hangs_is_replaced(gloo2, tmp_path, when):  # type: ignore[no-untyped-def]
    """It may have inherited a lock that nobody gives back."""
    (first, nothing), (second, said) = gloo2.run(
        save_with_a_writer_that_hangs, tmp_path / "run", when
    )
    assert (first, second) == (4, 4)
    assert nothing == []
    is_replaced = ["does nothing; it is stopped" in text for text in said]
    assert is_replaced == ([True] if when == "before" else [])
