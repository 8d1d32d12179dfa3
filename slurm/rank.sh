#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# One rank: turns what Slurm says of this task into the variables that torch.distributed reads, then becomes the command.
# `srun ... slurm/rank.sh COMMAND ARGS...`; MASTER_ADDR and MASTER_PORT come from slurm.launcher.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
# Compile caches on the node's own disk: on a shared one 128 ranks write the same files at once.
local_cache=${SLURM_TMPDIR:-/tmp}/megatron_eve-$UID-$SLURM_JOB_ID
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local_cache/inductor}
# Ahead of the time limit USR2 may come before the command listens, imports being slow; by default it would kill the rank.
# One rank that heard it is enough, because the trainer stops on all ranks together.
trap '' USR2
if [ -n "${EVE_PROFILE:-}" ]; then # becomes the command, under nsys on the ranks that EVE_PROFILE names
    exec "$PYTHON" -m megatron_eve.tools.profile exec --steps "$EVE_PROFILE" -- "$@"
fi
exec "$@"
