#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# A real Slurm with emulated nodes on one machine, for tests. Root, Debian packages slurm-wlm and munge, no systemd.
#
#   eval "$(toy_slurm.sh up)"     start; prints export TOY_SLURM_DIR=... SLURM_CONF=... PATH=...
#   toy_slurm.sh node-kill N      SIGKILL every process of node N (ns mode)
#   toy_slurm.sh node-boot N      start node N again
#   toy_slurm.sh down             stop all, remove all
#
# ns mode (where namespaces are allowed): one outer set of namespaces holds everything, and in it each node has its own
#   host name, address, loopback, ports and /dev/shm. Killing the outer `unshare` ends all of it; nothing is left behind.
# flat mode (fallback): all slurmd in the host's namespaces on different ports; node names do not resolve there.
# Not emulated: cgroups, memory limits, CPU binding, GPUs (null devices stand in), accounting.
# Knobs: TOY_SLURM_NODES (16), TOY_SLURM_GPUS (8), TOY_SLURM_CPUS (128), TOY_SLURM_MODE (ns|flat),
#   TOY_SLURM_OWNER (a pid: everything goes down when that process is gone).
# shellcheck disable=SC2015 # `test && test || die` is meant as written
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
SELF=$(readlink -f "${BASH_SOURCE[0]}")
: "${TOY_SLURM_NODES:=16}" "${TOY_SLURM_GPUS:=8}" "${TOY_SLURM_CPUS:=128}"
NET=10.77

die() { echo "toy_slurm: $*" >&2; exit 1; }
name() { printf 'node%02d' "$1"; }

load() {
    D=${TOY_SLURM_DIR:-}
    [ -n "$D" ] && [ -f "$D/vars" ] || die "TOY_SLURM_DIR is not set to a running toy Slurm"
    # shellcheck source=/dev/null
    source "$D/vars"
}

# Run a command where the cluster lives.
inside() {
    if [ "$MODE" = ns ]; then
        nsenter -t "$(cat "$D/init.pid")" --mount --net --uts --pid --ipc --wd="$PWD" "$@"
    else
        "$@"
    fi
}

free_ports() { # $1: how many consecutive ones
    python3 - "$1" << 'PY'
import socket, sys
count = int(sys.argv[1])
for base in range(20000, 32000, count + 7):
    sockets = []
    try:
        for port in range(base, base + count):
            sockets.append(socket.socket())
            sockets[-1].bind(("", port))
    except OSError:
        continue
    finally:
        for s in sockets:
            s.close()
    print(base)
    break
PY
}

write_conf() {
    local host addr port nodes range i
    range="node[01-$(printf %02d "$TOY_SLURM_NODES")]"
    if [ "$MODE" = ns ]; then
        host=login addr=$NET.0.1 port=6817
        nodes="NodeName=$range NodeAddr=$NET.1.[1-$TOY_SLURM_NODES] Port=6818"
    else
        host=$(hostname -s) addr=127.0.0.1 port=$(free_ports $((TOY_SLURM_NODES + 1)))
        nodes="NodeName=$range NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + TOY_SLURM_NODES))]"
    fi
    # cred_expire: a requeued job waits that long (120 s by default). UnkillableStepTimeout: with the default of 60 s a
    # node's death drains the head node. The short timeouts make tests fast; sites have 300 s and more.
    cat > "$D/slurm.conf" << C
ClusterName=toy
SlurmctldHost=$host($addr)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munged.sock,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/spool/%n/slurmd.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
MinJobAge=3600
SlurmdTimeout=10
KillWait=5
UnkillableStepTimeout=180
MessageTimeout=10
TCPTimeout=3
ReturnToService=2
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DependencyParameters=kill_invalid_depend
$nodes CPUs=$TOY_SLURM_CPUS Boards=1 SocketsPerBoard=2 CoresPerSocket=$((TOY_SLURM_CPUS / 2)) ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:$TOY_SLURM_GPUS State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
C
    # Slurm drops a GPU entry without File; null devices are enough for it to count and number them.
    mkdir -p "$D/dev"
    for ((i = 0; i < TOY_SLURM_GPUS; i++)); do mknod "$D/dev/nvidia$i" c 1 3 2> /dev/null || : > "$D/dev/nvidia$i"; done
    printf 'AutoDetect=off\nName=gpu File=%s/dev/nvidia[0-%d]\n' "$D" $((TOY_SLURM_GPUS - 1)) > "$D/gres.conf"
    printf 'CgroupAutomount=no\n' > "$D/cgroup.conf"
    : > "$D/plugstack.conf"
    printf '127.0.0.1 localhost\n%s.0.1 login\n' "$NET" > "$D/hosts"
    for ((i = 1; i <= TOY_SLURM_NODES; i++)); do echo "$NET.1.$i $(name "$i")" >> "$D/hosts"; done
}

start_munge() {
    local i
    mkdir -p "$D/munge"
    chmod 700 "$D/munge"
    (umask 077 && head -c 128 /dev/urandom > "$D/munge/key")
    munged -F --key-file="$D/munge/key" --socket="$D/munged.sock" --pid-file="$D/munge/pid" \
        --log-file="$D/munge/log" --seed-file="$D/munge/seed" --num-threads=10 > "$D/log/munged.out" 2>&1 &
    echo $! > "$D/munged.pid"
    for ((i = 0; i < 100; i++)); do
        [ -S "$D/munged.sock" ] && return 0
        sleep 0.03
    done
    die "munged did not start: $(cat "$D/log/munged.out")"
}

start_node() { # $1: number of the node
    local n
    n=$(name "$1")
    mkdir -p "$D/spool/$n"
    if [ "$MODE" = ns ]; then
        # shellcheck disable=SC2016 # expanded in the node's own shell
        nsenter --net="/run/netns/$n" unshare --uts --mount --pid --ipc --fork --kill-child=KILL --mount-proc \
            bash -c 'hostname "$1"; mount -t tmpfs -o mode=1777 shm /dev/shm
                     slurmd -D -N "$1" -f "$2/slurm.conf" & while :; do wait; sleep 0.5; done' toynode "$n" "$D" \
            > "$D/log/slurmd-$n.out" 2>&1 < /dev/null &
    else
        setsid slurmd -D -N "$n" -f "$D/slurm.conf" > "$D/log/slurmd-$n.out" 2>&1 < /dev/null &
    fi
    echo $! > "$D/spool/$n.pid"
}

start_network() { # a bridge, and a network namespace with one leg on it for every node
    local i n
    mount --make-rprivate /
    hostname login
    ip link set lo up
    mount --bind "$D/hosts" /etc/hosts
    [ -d /run/netns ] || { mkdir -p /run/netns && : > "$D/made_netns"; }
    mount -t tmpfs netns /run/netns
    ip link add br0 type bridge
    ip addr add "$NET.0.1/16" dev br0
    ip link set br0 up
    for ((i = 1; i <= TOY_SLURM_NODES; i++)); do
        n=$(name "$i")
        ip netns add "$n"
        ip link add "v$i" type veth peer name eth0 netns "$n"
        ip link set "v$i" master br0 up
        printf 'addr add %s dev eth0\nlink set eth0 up\nlink set lo up\n' "$NET.1.$i/16" | ip -n "$n" -batch -
    done
}

init() { # pid 1 of the outer namespaces (ns mode), or the caller (flat mode)
    local i
    if [ "$MODE" = ns ]; then start_network; fi
    start_munge
    slurmctld -i -D -f "$D/slurm.conf" > "$D/log/slurmctld.out" 2>&1 < /dev/null &
    echo $! > "$D/ctld.pid"
    for ((i = 1; i <= TOY_SLURM_NODES; i++)); do start_node "$i"; done
    if [ "$MODE" = ns ]; then while :; do wait; sleep 0.2; done; fi # pid 1 stays and reaps
}

choose_mode() {
    if unshare --mount --net --uts --pid --ipc --fork --mount-proc \
        sh -c 'ip link add b0 type bridge && ip link add v0 type veth peer name v1' > /dev/null 2>&1; then
        echo ns
    else
        echo flat
    fi
}

start_outer() { # the outer namespaces, and commands on PATH that enter them
    local i p='' u c here
    setsid unshare --mount --net --uts --pid --ipc --fork --kill-child=KILL --mount-proc bash "$SELF" _init \
        > "$D/log/init.out" 2>&1 < /dev/null &
    u=$!
    echo $u > "$D/unshare.pid"
    for ((i = 0; i < 100; i++)); do
        p=$(cat "/proc/$u/task/$u/children" 2> /dev/null || true)
        p=${p%% *}
        [ -n "$p" ] && break
        sleep 0.02
    done
    [ -n "$p" ] || die "the outer namespaces did not start: $(cat "$D/log/init.out")"
    echo "$p" > "$D/init.pid"
    here=$(readlink /proc/self/ns/mnt)
    for c in sbatch srun squeue sinfo scancel scontrol; do
        cat > "$D/bin/$c" << C
#!/bin/sh
# $c on the emulated login node; inside the namespaces it is just the command
[ "\$(readlink /proc/self/ns/mnt)" = "$here" ] || exec /usr/bin/$c "\$@"
export SLURM_CONF=$D/slurm.conf
exec nsenter -t $p --mount --net --uts --pid --ipc --wd="\$PWD" /usr/bin/$c "\$@"
C
    done
    chmod 755 "$D"/bin/*
}

watch_owner() { # a killed test runner leaves nothing behind
    # shellcheck disable=SC2016 # expanded in the watcher's own shell
    setsid bash -c 'while kill -0 "$1" 2> /dev/null && [ -d "$2" ]; do sleep 1; done
                    [ ! -d "$2" ] || TOY_SLURM_DIR=$2 exec bash "$3" down' watch "$TOY_SLURM_OWNER" "$D" "$SELF" \
        > /dev/null 2>&1 < /dev/null &
}

cmd_up() {
    local deadline idle
    command -v slurmctld > /dev/null && command -v munged > /dev/null || die "install slurm-wlm and munge first"
    [ "$(id -u)" = 0 ] || die "run as root"
    MODE=${TOY_SLURM_MODE:-$(choose_mode)}
    D=$(mktemp -d "${TMPDIR:-/tmp}/toyslurm.XXXXXX")
    chmod 755 "$D"
    mkdir -p "$D"/{state,spool,log,bin}
    printf 'TOY_SLURM_NODES=%q\nMODE=%q\n' "$TOY_SLURM_NODES" "$MODE" > "$D/vars"
    write_conf
    export TOY_SLURM_DIR=$D SLURM_CONF=$D/slurm.conf
    if [ "$MODE" = ns ]; then start_outer; else init; fi
    [ -z "${TOY_SLURM_OWNER:-}" ] || watch_owner
    deadline=$((SECONDS + 60))
    while :; do
        idle=$(inside sinfo -h -p main -t idle -o %D 2> /dev/null || true)
        [ "$idle" = "$TOY_SLURM_NODES" ] && break
        if [ $SECONDS -ge $deadline ]; then
            { inside sinfo -Nl; tail -n 12 "$D"/log/*.out; } >&2 || true
            cmd_down
            die "not all nodes were idle after 60 s"
        fi
        sleep 0.1
    done
    printf 'export TOY_SLURM_DIR=%q SLURM_CONF=%q PATH=%q\n' "$D" "$D/slurm.conf" "$D/bin:$PATH"
}

cmd_down() {
    local i p file
    load
    if [ "$MODE" = ns ]; then
        kill -KILL "$(cat "$D/unshare.pid")" 2> /dev/null || true
        p=$(cat "$D/init.pid")
    else
        scancel -u root --signal=KILL --full 2> /dev/null || true
        scancel -u root 2> /dev/null || true
        sleep 0.5
        for file in "$D"/spool/*.pid "$D/ctld.pid" "$D/munged.pid"; do
            [ ! -f "$file" ] || kill -KILL "$(cat "$file")" 2> /dev/null || true # no munged, no SIGTERM to slurmd
        done
        p=$(cat "$D/munged.pid")
    fi
    for ((i = 0; i < 200; i++)); do
        [ -d "/proc/$p" ] && ! grep -q '^State:.Z' "/proc/$p/status" 2> /dev/null || break
        sleep 0.02
    done
    [ ! -e "$D/made_netns" ] || rmdir /run/netns 2> /dev/null || true
    rm -rf "$D"
}

case ${1:-} in
    up) cmd_up ;;
    down) cmd_down ;;
    node-kill)
        load
        # shellcheck disable=SC2016 # the pid is one of the inner namespace
        inside bash -c 'kill -KILL "$(cat "$1")"' kill "$D/spool/$(name "$((10#${2#node}))").pid"
        ;;
    node-boot)
        load
        inside env TOY_SLURM_DIR="$D" SLURM_CONF="$D/slurm.conf" bash "$SELF" _boot "$((10#${2#node}))"
        ;;
    _init) load && init ;;
    _boot) load && start_node "$2" ;;
    *)
        sed -n '3,18p' "$SELF" >&2
        exit 2
        ;;
esac
