# SPDX-License-Identifier: Apache-2.0
"""Ranks that hold the same shards share the writing and the reading of a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_eve.checkpoint.manager import CheckpointManager
from megatron_eve.checkpoint.manifest import read_manifest
from megatron_eve.checkpoint.weights import load_weights
from megatron_eve.config.schema import ParallelConfig
from tests.checkpoint.test_faults import MODEL, assemble, folder, save
from tests.support.tiny import layout
from tests.support.train_once import build, run_config

PARALLEL = {
    "replicas": layout(data=2, distributed_optimizer=False),
    "distributed optimizer": layout(data=2, distributed_optimizer=True),
    "context": layout(context=2, distributed_optimizer=True),
}
EVEN = 0.3  # at least; the tiny model's largest tensor is a third of it


def read_by(load: Callable[[], object]) -> dict[Any, int]:
    """Stored shard -> elements that this rank reads of it while it loads."""
    found: dict[Any, int] = {}
    read_data = FileSystemReader.read_data

    def spy(self: FileSystemReader, plan: Any, planner: Any) -> Any:
        for item in plan.items:
            key = (item.storage_index.fqn, tuple(item.storage_index.offset or ()))
            found[key] = found.get(key, 0) + item.lengths.numel()
        return read_data(self, plan, planner)

    with patch.object(FileSystemReader, "read_data", spy):
        load()
    return found


def resume(parallel: ParallelConfig, run_dir: Path) -> dict[Any, int]:
    training = assemble(parallel)
    manager = CheckpointManager(run_dir, keep_last=1, config_text="")
    return read_by(lambda: manager.resume(training))


def start_from(parallel: ParallelConfig, run_dir: Path) -> dict[Any, int]:
    chunks, *_ = build(run_config(MODEL, parallel), weights=None)
    return read_by(lambda: load_weights(chunks, run_dir, copy_text_to_vision=False))


@pytest.mark.parametrize("name", PARALLEL)
def test_replicas_share_the_work(gloo2, tmp_path, name):  # type: ignore[no-untyped-def]
    parallel = PARALLEL[name]
    gloo2.run(save, parallel, tmp_path, (1,))
    files = read_manifest(folder(tmp_path, 1)).files
    written = [files[f"__{rank}_0.distcp"].bytes for rank in (0, 1)]
    assert min(written) > EVEN * sum(written)
    for load in (resume, start_from):
        first, second = gloo2.run(load, parallel, tmp_path)
        tensors = {key for key in first | second if "random" not in key[0]}
        assert len(tensors) > 20
        assert not tensors & first.keys() & second.keys(), "nothing is read twice"
        counts = [sum(read[key] for key in tensors & read.keys()) for read in (first, second)]
        assert min(counts) > EVEN * sum(counts)
