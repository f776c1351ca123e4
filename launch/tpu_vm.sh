#!/usr/bin/env bash
# A run on a Cloud TPU slice: a queued resource is asked for, jaxlm is put on all its workers, and the run starts there; when the slice
# is preempted another one is asked for, and the run goes on from its newest checkpoint (launch/restart.py says when not).
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=v5p-128 --runtime=VERSION --bucket=BUCKET [--project=P] [--spot] [--delete]
#                    [--backoff=30] [--poll=30] [--dry-run] -- train --config=… --workdir=bucket/RUN [--config.KEY=VALUE …]
# BUCKET is mounted with gcsfuse, as `bucket` beside the code, on every worker: --workdir=bucket/RUN is gs://BUCKET/RUN.
# What is sent is the commit that is checked out here. --delete: gives the slice back once the run is done. --dry-run prints every
# command. Ctrl-C: all workers save, and end. Exit code: that of the run (jaxlm/errors.py), 4 after three starts without progress.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name='' zone='' type='' runtime='' bucket='' project='' spot='' delete='' dry='' attempt='' backoff=30 poll=30
all=("$@")
fail() { echo "tpu_vm: $*" >&2; exit 2; }
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --name=* | --zone=* | --type=* | --runtime=* | --bucket=* | --project=* | --backoff=* | --poll=*)
      key="${1%%=*}"; printf -v "${key#--}" %s "${1#*=}" ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry=1 ;;
    --attempt) attempt=1 ;;
    *) fail "$1: no such flag; see the head of $0" ;;
  esac
  shift
done
for key in name zone type runtime bucket; do
  [ -n "${!key}" ] || fail "wants --$key=…"
done
[ $# -gt 1 ] || fail "wants -- train --config=… --workdir=bucket/RUN"
shift
workdir=''
for word in "$@"; do
  case "$word" in --workdir=*) workdir="${word#--workdir=}" ;; esac
done
[[ "$workdir" == bucket/?* ]] || fail "--workdir=$workdir: wants bucket/RUN, which is gs://$bucket/RUN on every worker"

where=(--zone="$zone" ${project:+--project="$project"})
newest="gcloud storage ls gs://$bucket/${workdir#bucket/}/checkpoints/ 2>/dev/null | sed -n 's|.*/\\([0-9][0-9]*\\)/\$|\\1|p' | sort -n | tail -n 1"
create=(gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" --accelerator-type="$type"
  --runtime-version="$runtime" ${spot:+--spot})
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)")
remove=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
tarball="${TMPDIR:-/tmp}/jaxlm-$name.tar.gz"
archive=(git -C "$root" archive --format=tar.gz --output="$tarball" HEAD)
send=(gcloud compute tpus tpu-vm scp "$tarball" "$name:jaxlm.tar.gz" "${where[@]}" --worker=all)
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all)
# shellcheck disable=SC2016  # the workers expand it
setup=("${ssh[@]}" --command='mkdir -p jaxlm/bucket && tar -xzf jaxlm.tar.gz -C jaxlm && cd jaxlm && { [ -x .venv/bin/jaxlm ] || { '\
'python3 -m venv .venv && .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[tpu]"; }; } && '\
'{ command -v gcsfuse >/dev/null || sudo apt-get install --yes gcsfuse; } && { mountpoint -q bucket || gcsfuse --implicit-dirs '"$bucket"' bucket; }')
ours="^[^ ]*python -m jaxlm train"
# What an ssh that was cut off left behind goes first: two runs in one workdir are none.
run=("${ssh[@]}" --command="cd jaxlm; pkill -KILL -f '$ours'; .venv/bin/python -m jaxlm $(printf '%q ' "$@"); echo \"jaxlm: exit code \$?\"")
stop=("${ssh[@]}" --command="pkill -TERM -f '$ours'")

show() { printf '%q ' "$@"; echo; }
if [ -n "$dry" ]; then
  echo "# the newest step: $newest"
  show "${create[@]}"
  echo "# until it says ACTIVE; at SUSPENDED, FAILED or SUSPENDING the resource is deleted (as below), and asked for again"
  show "${describe[@]}"
  show "${archive[@]}"
  show "${send[@]}"
  show "${setup[@]}"
  show "${run[@]}"
  echo "# when it is told to stop"
  show "${stop[@]}"
  echo "# once it is done, with --delete"
  show "${remove[@]}"
  exit
fi
if [ -z "$attempt" ]; then
  python="${PYTHON:-python3}"
  command -v gcloud >/dev/null || fail "gcloud: no such program; install the Google Cloud CLI"
  code=0
  "$python" "$root/launch/restart.py" --newest="$newest" --backoff="$backoff" -- "$0" --attempt "${all[@]}" &
  child=$!
  trap 'kill -TERM "$child"' TERM INT
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  [ "$code" != 0 ] || [ -z "$delete" ] || "${remove[@]}"
  exit "$code"
fi

state=$("${describe[@]}" 2>/dev/null) || state=NONE
until [ "$state" = ACTIVE ]; do
  case "$state" in
    NONE) "${create[@]}" ;;
    SUSPENDED | SUSPENDING | FAILED)
      echo "tpu_vm: $name is $state; another one is asked for" >&2
      "${remove[@]}"
      "${create[@]}" ;;
  esac
  sleep "$poll"
  state=$("${describe[@]}") || state=NONE
done
"${archive[@]}"
"${send[@]}" || exit 11
"${setup[@]}" || exit 11
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap '"${stop[@]}" || true' TERM INT
"${run[@]}" 2>&1 | tee "$log" &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
codes=$(sed -n 's/.*jaxlm: exit code \([0-9]*\).*/\1/p' "$log" | sort -nu)
for final in 2 3; do
  if grep -qx "$final" <<<"$codes"; then exit "$final"; fi
done
exit "$(tail -n 1 <<<"${codes:-11}")"  # 11: no worker came to say how it ended
