# SPDX-License-Identifier: Apache-2.0
"""Process groups: built once from the layout and passed on explicitly. The only file that reads parallel_state."""

import datetime
import os
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_eve import device
from megatron_eve.config.layout_checks import refuse_other_process_count
from megatron_eve.config.schema import ParallelConfig
from megatron_eve.errors import ParallelError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelState:
    """This process's place in the layout and its groups."""

    groups: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_data_leader(self) -> bool:
        """Whether this process reads the data for all that compute on the same packs."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.pp_rank == 0


def init_distributed(*, timeout_s: int) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; alone if they are unset.

    Raises: ParallelError if only some of them are set.
    """
    if torch.distributed.is_initialized():
        return
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and len(missing) < len(names):
        raise ParallelError(
            f"the environment has some of {', '.join(names)} but not {', '.join(missing)}; "
            "start with torchrun or the files in slurm/, or unset all of them for a single process"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    target = device.local_device(local_rank)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = device.collective_backend()
    if missing:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            backend, store=store, rank=0, world_size=1, timeout=timeout
        )
    else:
        torch.distributed.init_process_group(backend, timeout=timeout)


def init_model_parallel(
    parallel: ParallelConfig, *, seed: int, timeout_s: int = 1800
) -> ParallelState:
    """Build every group of the layout and seed the random generators. No collective of any group waits longer than
    `timeout_s`.

    Raises: ParallelError if the number of processes is not the layout's.
    """
    world_size = torch.distributed.get_world_size()
    refuse_other_process_count(parallel, running=world_size)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    interleaved = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=interleaved,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=device.has_gpu(),
        # Groups do not inherit the world's limit; a fraction is as good as a whole number of minutes.
        distributed_timeout_minutes=timeout_s / 60,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    pp_rank = groups.pp.rank()
    torch.manual_seed(seed + 100 * pp_rank)  # stages have different layers
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelState(
        groups=groups,
        device=device.local_device(int(os.environ.get("LOCAL_RANK", 0))),
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        tp_rank=groups.tp.rank(),
        cp_rank=groups.cp.rank(),
        pp_rank=pp_rank,
        dp_rank=groups.dp.rank(),
        dp_size=groups.dp.size(),
        is_first_stage=pp_rank == 0,
        is_last_stage=pp_rank == groups.pp.size() - 1,
    )
