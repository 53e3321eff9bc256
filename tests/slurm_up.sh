#!/usr/bin/env bash
# A throw-away SLURM cluster of two virtual nodes on this machine, for tests/slurm.py. Nothing outside ROOT is touched, except that
# the Debian packages slurm-wlm and munge are installed where they are missing. PORT and the two ports after it must be free.
#   bash tests/slurm_up.sh ROOT PORT      then: export SLURM_CONF=ROOT/slurm.conf
#   bash tests/slurm_down.sh ROOT
set -euo pipefail
root=$1 port=$2 me=$(id -un) host=$(hostname -s)
die() { echo "slurm_up: $*" >&2; exit 1; }

missing=$(for p in slurm-wlm munge; do dpkg-query -W -f='${db:Status-Status}' $p 2>/dev/null | grep -qx installed || echo $p; done)
if [ -n "$missing" ]; then
  [ "$(id -u)" = 0 ] || die "not installed, and only root can install: "$missing
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing; } >&2
fi

umask 022
mkdir -p "$root"/{log,pid,state,n1,n2}
export SLURM_CONF=$root/slurm.conf
socket=$root/munge.socket # a path of at most 108 bytes

started() { awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null || true; }
launch() { # NAME COMMAND...: in a session of its own; its pid and start time are recorded, so that no other process is ever ended
  setsid nohup "${@:2}" >>"$root/log/$1.out" 2>&1 </dev/null &
  echo "$! $(started $!)" >"$root/pid/$1"
}
wait_for() { for _ in $(seq 150); do timeout 5 "$@" >/dev/null 2>&1 && return; sleep 0.1; done; tail -n 5 "$root"/log/* >&2; die "no answer: $*"; }

(umask 077; head -c 1024 /dev/urandom >"$root/munge.key")
launch munged /usr/sbin/munged --foreground --force --num-threads=2 --key-file="$root/munge.key" --socket="$socket" \
  --pid-file="$root/munged.pid" --log-file="$root/log/munged.log" --seed-file="$root/munge.seed"
wait_for munge -S "$socket" -n

cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits for cred_expire seconds: 120, or what is said here, at least 5
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/%n
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# every node may claim more CPUs and memory than there are
SlurmdParameters=config_overrides
ReturnToService=1
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=3
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=4 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1 MaxTime=60 State=UP
CONF
# two GPUs each that are none: SLURM counts them, hands them out and sets CUDA_VISIBLE_DEVICES
echo "NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero" >"$root/gres.conf"

launch slurmctld /usr/sbin/slurmctld -D -f "$SLURM_CONF"
for n in n1 n2; do launch "slurmd-$n" /usr/sbin/slurmd -D -N $n -f "$SLURM_CONF"; done
wait_for scontrol ping
wait_for bash -c '[ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" = 2 ]'
