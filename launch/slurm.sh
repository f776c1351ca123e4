#!/usr/bin/env bash
# A run under Slurm, one process a node or a GPU, that goes on after preemption, its time limit and lost nodes:
#   launch/slurm.sh [--dry-run] [SBATCH OPTIONS] -- train --config=… --workdir=… [--config.KEY=VALUE …]
#   launch/slurm.sh --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 --partition=gpu -- train …
# What SBATCH OPTIONS do not say is: --requeue --open-mode=append --signal=TERM@180 (three minutes before the time limit all
# processes save and end with 10) and --job-name=jaxlm. The workdir must be on storage that all nodes share.
# 1. srun starts the processes, which find each other by Slurm's variables (jaxlm/cluster.py).
# 2. launch/restart.py starts them again in the same job when they die, are lost or meet a storage error.
#    With --elastic a process or node that is lost does not end the others; when they end, the run has.
# 3. Preempted (10), the job is requeued, unless it was cancelled; it counts its starts without progress from one to the next.
# BACKOFF=5 is restart.py's. PYTHON=… chooses the interpreter, on all nodes; by default that of .venv, else python3.
set -euo pipefail

if [ "${1:-}" != --job ]; then
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  dry=
  options=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    if [ "$1" = --dry-run ]; then dry=1; else options+=("$1"); fi
    shift
  done
  [ $# -gt 1 ] || { echo "slurm: wants [SBATCH OPTIONS] -- train --config=… --workdir=…" >&2; exit 2; }
  shift
  case " $* " in
    *" --workdir="*) ;;
    *) echo "slurm: wants --workdir=DIR, on storage that all nodes share" >&2; exit 2 ;;
  esac
  case " $* " in
    *" --elastic "*) options+=(--no-kill) ;;
  esac
  submit=(sbatch --job-name=jaxlm --requeue --open-mode=append --signal=TERM@180 "${options[@]}" "$root/launch/slurm.sh" --job "$root" "$@")
  if [ -n "$dry" ]; then
    printf '%q ' "${submit[@]}"
    echo
    exit
  fi
  exec "${submit[@]}"
fi

root="$2"
shift 2
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
# shellcheck source=launch/python.sh
. "$root/launch/python.sh"
code=0
wait=(--wait=90)  # the others of a process that ended have as long as a heartbeat to notice
case " $* " in
  *" --elastic "*) wait=(--wait=0 --kill-on-bad-exit=0 --no-kill) ;;
esac
"$python" "$root/launch/restart.py" --stop-when-preempted --backoff="${BACKOFF:-5}" --state="$workdir/restart-$SLURM_JOB_ID.json" -- \
  srun "${wait[@]}" "$python" -m jaxlm "$@" || code=$?
if [ "$code" = 10 ] && scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
  echo "slurm: requeues job $SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
