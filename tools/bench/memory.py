# SPDX-License-Identifier: Apache-2.0
"""What frozen sets save: bytes of weights, gradient buffers, optimizer state and data-parallel traffic, by stage.

Each stage runs two optimizer steps in two fresh processes (data parallel, distributed optimizer). Tensors are counted,
collectives too; beside them what `--dry-run` estimates, and, for information, how far the peak resident memory of a
process rose above what it was when the imports were done.

    python -m tools.bench.memory --out runs/bench
"""

import argparse
import itertools
import multiprocessing
import os
import resource
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_eve.command import end_with
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.sizes import memory_estimate
from megatron_eve.parallel.groups import init_distributed, init_model_parallel
from tools.bench.contenders import OurStep
from tools.bench.counting import CollectiveTraffic, held_bytes
from tools.bench.report import BenchmarkError, add_output_options, markdown_table, run_benchmark
from tools.bench.samples import as_pack, steps_of_packs, stream
from tools.bench.setting import STAGES, Scale, scaled_config

DATA_PARALLEL = 2
TIMEOUT_S = 600
_MIB = 2**20


def count_stage(config: RunConfig, *, token_share: float) -> dict[str, Any]:
    """Two steps of a stage in this process group; what this process held and sent."""
    state = init_model_parallel(config.parallel, seed=config.train.seed)
    imported = _peak_rss()
    ours = OurStep(config, state=state)
    samples = stream(config, token_share=token_share, seed=config.data.seed)
    steps = steps_of_packs(config, samples, packs_per_step=state.dp_size)
    first, second = (
        [as_pack(one.packs[state.dp_rank], config=config)] for one in itertools.islice(steps, 2)
    )
    ours.step(first)  # allocates the moments
    with CollectiveTraffic() as traffic:
        ours.step(second)
    held = held_bytes(ours.training.wrapped, ours.training.optimizer)
    trained = [param.numel() for param in ours.model.parameters() if param.requires_grad]
    return {
        "parameters": sum(param.numel() for param in ours.model.parameters()),
        "trained_parameters": sum(trained),
        "weights": held.weights,
        "gradient_buffers": held.gradient_buffers,
        "optimizer_state": held.optimizer_state,
        "traffic_per_step": traffic.tensor_bytes(),
        "peak_rss_above_imports": _peak_rss() - imported,
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _serve(rank: int, port: int, config: RunConfig, token_share: float, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(DATA_PARALLEL),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    init_distributed(timeout_s=TIMEOUT_S)
    pipe.send(count_stage(config, token_share=token_share))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_fresh_processes(config: RunConfig, *, token_share: float) -> list[dict[str, Any]]:
    """`count_stage` on every rank.

    Raises: BenchmarkError if a process ends without an answer (its traceback is on stderr).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Any, Connection]] = []
    for rank in range(DATA_PARALLEL):
        ours, theirs = context.Pipe()
        worker = context.Process(
            target=_serve, args=(rank, port, config, token_share, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        workers.append((worker, ours))
    try:
        return [_answer(pipe, rank=rank) for rank, (_, pipe) in enumerate(workers)]
    finally:
        for worker, _ in workers:
            worker.join(timeout=20)
            worker.kill()


def _answer(pipe: Connection, *, rank: int) -> dict[str, Any]:
    try:
        if pipe.poll(TIMEOUT_S):
            answer: dict[str, Any] = pipe.recv()
            return answer
    except EOFError:
        pass
    raise BenchmarkError(f"rank {rank} gave no answer; its error is above.")


def _row(config: RunConfig, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    estimate = memory_estimate(config)
    return {
        "stage": config.stage.name,
        "trainable": list(config.stage.trainable),
        "ranks": list(ranks),
        "optimizer_state_all_ranks": sum(rank["optimizer_state"] for rank in ranks),
        "estimate": {
            "weights": estimate.weights,
            "gradients": estimate.gradients,
            "optimizer": estimate.optimizer,
        },
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    def mib(number: float) -> str:
        return f"{number / _MIB:,.2f}"

    return markdown_table(
        [
            {
                "stage": "2.2, 3" if row["stage"] == "2.2" else row["stage"],
                "parameters": f"{first['parameters']:,}",
                "trained": f"{first['trained_parameters']:,}",
                "weights, MiB": mib(first["weights"]),
                "gradient buffers, MiB": mib(first["gradient_buffers"]),
                "optimizer state, MiB": mib(first["optimizer_state"]),
                "held, all": mib(
                    first["weights"] + first["gradient_buffers"] + first["optimizer_state"]
                ),
                "estimate": mib(sum(row["estimate"].values())),
                "traffic, MiB a step": mib(sum(first["traffic_per_step"].values())),
                "peak RSS above imports, MiB": f"{first['peak_rss_above_imports'] / _MIB:,.0f}",
            }
            for row in rows
            for first in row["ranks"][:1]
        ]
    )


def _measure_stages(options: argparse.Namespace) -> list[dict[str, Any]]:
    scale = Scale(
        hidden_size=options.hidden, num_layers=options.layers, token_share=options.token_share
    )
    rows = []
    for stage in options.stages:
        config = scaled_config(stage, scale=scale, data_parallel=DATA_PARALLEL)
        ranks = in_fresh_processes(config, token_share=options.token_share)
        rows.append(_row(config, ranks))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured and written, 1 not."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.memory",
        description="Bytes held and sent by each stage, per process of two (data parallel).",
        epilog="example: python -m tools.bench.memory --out runs/bench",
    )
    add_output_options(parser, name="memory")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (512)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (4)")
    parser.add_argument("--token-share", type=float, default=0.125, help="of 7B's tokens (0.125)")
    options = parser.parse_args(arguments)
    options.data_parallel = DATA_PARALLEL  # kept with the settings
    return run_benchmark(
        options, name="memory", measure=lambda: _measure_stages(options), table=_table
    )


if __name__ == "__main__":
    end_with(main)
