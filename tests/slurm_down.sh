#!/usr/bin/env bash
# Take the cluster of slurm_up.sh down: bash tests/slurm_down.sh ROOT
# Ends only what is its own: the processes that slurm_up.sh recorded (pid and start time), and those of the cluster's jobs, told
# by SLURM_CONF and SLURM_JOB_ID in their environment or by a step daemon's open log.
set -uo pipefail
root=$1
export SLURM_CONF=$root/slurm.conf
[ -d "$root/pid" ] || exit 0

started() { awk '{sub(/.*\) /, ""); if ($1 != "Z") print $20}' "/proc/$1/stat" 2>/dev/null; } # Z: ended, not yet reaped
stop() { # NAME: TERM, up to 10 s, then KILL
  local pid time
  read -r pid time <"$root/pid/$1" || return
  [ -n "$time" ] && [ "$(started "$pid")" = "$time" ] && kill -TERM "$pid"
  for _ in $(seq 100); do [ "$(started "$pid")" = "$time" ] || return; sleep 0.1; done
  kill -KILL "$pid"
}

# the jobs first: their step daemons would outlive slurmd
timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel
for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h -o %A)" ] && break; sleep 0.1; done
for name in slurmd-n1 slurmd-n2 slurmctld munged; do [ -e "$root/pid/$name" ] && stop $name; done

of_a_job() { tr '\0' '\n' 2>/dev/null <"$1/environ" | awk -v c="SLURM_CONF=$SLURM_CONF" '$0 == c {a = 1} /^SLURM_JOB_ID=/ {b = 1} END {exit !(a && b)}'; }
step_daemon() { [[ $(readlink "$1/exe") = */slurmstepd* ]] && ls -l "$1/fd" 2>/dev/null | grep -qF -- "-> $root/log/"; }
left=0
for p in /proc/[0-9]*; do
  if [ "${p#/proc/}" != $$ ] && { step_daemon "$p" || of_a_job "$p"; } 2>/dev/null; then
    echo "slurm_down: left over: $(tr '\0' ' ' <"$p/cmdline" 2>/dev/null)" >&2
    kill -KILL "${p#/proc/}" && left=1
  fi
done
rm -rf "$root/pid"
exit $left
