# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Environment of every job, sourced by the sbatch files. A variable that is already set wins, so a site overrides in
# its own shell, with `sbatch --export`, or in the file that EVE_SITE_ENV names (network interfaces, HCA names, modules).
# Reads: the sbatch file's arguments, and RECIPE (set by it). Sets: PYTHON, RUN_DIR, TRAIN (the trainer's command line),
# RANK_LOGS and what stands below with its reason.

# --- what was asked for: words of the sbatch line, which reach every job; the environment may not (sbatch --export)
eve_words() { # [RECIPE] [run_dir=FOLDER] [NAME=value ...] [section.key=value ...]; they win over the environment
    local word recipe=''
    OVERRIDES=()
    for word in "$@"; do
        case $word in
            run_dir=?*) RUN_DIR=${word#run_dir=} ;;
            PYTHON=* | TRAIN_CMD=* | EVE_*=*) export "${word?}" ;;
            -* | *.*=*) OVERRIDES+=("$word") ;;
            '' | *=*) echo "found '$word', expected RECIPE, run_dir=FOLDER, section.key=value or a variable of docs/slurm.md" >&2; exit 2 ;;
            *)
                [ -z "$recipe" ] || { echo "found two recipes, $recipe and $word; expected one" >&2; exit 2; }
                RECIPE=$word recipe=$word
                ;;
        esac
    done
}
eve_words "$@"
if [ -n "${EVE_SITE_ENV:-}" ]; then
    # shellcheck source=/dev/null
    source "$EVE_SITE_ENV"
    eve_words "$@"
fi

# --- what runs, and where
if [ -z "${PYTHON:-}" ]; then # the environment's interpreter, on a path that every node sees
    if [ -x .venv/bin/python ]; then PYTHON=$PWD/.venv/bin/python; else PYTHON=python3; fi
fi
: "${RUN_DIR:=runs/$RECIPE}"                        # shared file system: checkpoints, logs, STOP, DONE
TRAIN=("$PYTHON" -m megatron_eve.train)             # what rank.sh becomes
if [ -n "${TRAIN_CMD:-}" ]; then                    # or the site's, a command line in which quotes keep words together
    TRAIN=()
    while IFS= read -r -d '' word; do TRAIN+=("$word"); done < <(xargs printf '%s\0' <<< "$TRAIN_CMD")
    [ ${#TRAIN[@]} -gt 0 ] || { echo "found TRAIN_CMD=$TRAIN_CMD, expected a command line" >&2; exit 2; }
fi
TRAIN+=("$RECIPE" "run_dir=$RUN_DIR" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
: "${EVE_MAX_RESTARTS:=50}"                         # requeues of one job by failures, then a person must look
: "${EVE_MAX_NO_PROGRESS:=3}"                       # starts of one job that the ranks failed at the step where they began
: "${EVE_SLURM_PATIENCE_S:=900}"                     # how long a command of Slurm that fails is tried again
RANK_LOGS=$RUN_DIR/logs/${SLURM_JOB_ID:-0}-r${SLURM_RESTART_COUNT:-0} # one file a rank and start
: "${EVE_STOP_GRACE_S:=480}"                         # ranks that have not stopped by then are killed; of the 600 s signal
: "${EVE_PROFILE:=}"                                 # steps to record, 10-12 or 10-12@0,8 (ranks): docs/profiling.md
export EVE_PROFILE EVE_STOP_GRACE_S EVE_SLURM_PATIENCE_S PYTHON RUN_DIR RANK_LOGS EVE_MAX_RESTARTS EVE_MAX_NO_PROGRESS

# --- limits
ulimit -c 0                                         # 128 core dumps of 100 GB fill a file system
ulimit -n "$(ulimit -Hn)" || true                   # shards, sockets and pinned files of eight ranks
ulimit -l unlimited 2> /dev/null || true            # InfiniBand registers memory; slurm.preflight checks what came out

# --- processes
export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}" # since Slurm 22.05 srun does not inherit it
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"      # eight ranks with one thread per core each would fight for the cores
export PYTHONUNBUFFERED=1                           # the last lines before a crash reach the log
export PYTHONFAULTHANDLER=1                         # a crash in native code leaves a Python stack

# --- CUDA, NCCL, torch (no effect on CPU)
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # order of tensor-parallel collectives and GEMMs
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}" # packs' image counts differ: less fragmentation
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"             # name what failed, no more
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}" # a broken collective ends the rank, not hangs it
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" # flight recorder: last collectives of each rank
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}" # ... written out when one times out
export NVTE_FLASH_ATTN="${NVTE_FLASH_ATTN:-1}"      # packed attention on A100 exists in flash-attn only

# --- tools
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"        # 128 ranks must not ask a hub for a tokenizer that lies on disk
