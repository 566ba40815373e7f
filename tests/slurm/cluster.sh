#!/usr/bin/env bash
# A Slurm cluster of two nodes, both on this machine, with all files in FOLDER. Needs root.
#
#   cluster.sh start|stop FOLDER
#   export SLURM_CONF=FOLDER/slurm.conf   # afterwards, for sbatch, squeue etc.
set -euo pipefail
if [ $# -ne 2 ] || { [ "$1" != start ] && [ "$1" != stop ]; }; then
    echo "usage: cluster.sh start|stop FOLDER" >&2
    exit 2
fi
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF="$folder/slurm.conf"

stop() {
    for daemon in slurmd.a slurmd.b slurmctld munged; do # by the process ids that they wrote down
        if [ -f "$folder/$daemon.pid" ]; then
            pid=$(cat "$folder/$daemon.pid")
            kill "$pid" 2>/dev/null || true
            for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        fi
    done
}

start() {
    port=$((20000 + $$ % 12000)) # below those that the system gives to connections
    mkdir -p "$folder/state" "$folder/spool.a" "$folder/spool.b"
    chmod 711 "$folder"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 400 "$folder/munge.key"
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for as long as a credential is valid.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
MinJobAge=10
NodeName=a,b NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1)),$((port + 2)) \
    CPUs=$(nproc) State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES State=UP OverSubscribe=FORCE:4
# Jobs in high preempt those in low, which get a warning and a minute of time.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=low Nodes=ALL State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10
CONF
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
        --seed-file="$folder/munged.seed" 2>>"$folder/munged.err"
    slurmctld -c
    slurmd -N a
    slurmd -N b
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --format=%T 2>/dev/null | sort -u)" = idle ]; then return; fi
        sleep 0.2
    done
    echo "cluster.sh: error: no idle nodes after 20 seconds; see $folder/*.log" >&2
    stop
    exit 1
}

"$1"
