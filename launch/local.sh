#!/usr/bin/env bash
# N processes of one run on this machine, started again when they end for no fault of the config (launch/restart.py):
#   launch/local.sh [-n N] [--dry-run] [--once] [--backoff=5] [--grace=30] -- train --config=… --workdir=… [--config.KEY=VALUE …]
# On CPU, JAX_NUM_CPU_DEVICES=K gives each process K devices; of GPUs each has the one of its number. PYTHON=… chooses the
# interpreter; by default that of .venv, else python3. Exit code: that of the run (jaxlm/errors.py), 4 after three starts in a row
# without a newer checkpoint.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/python.sh
. "$root/launch/python.sh"
count=1
words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    -n) count="${2:-}"; shift ;;
    -n*) count="${1#-n}" ;;
    --dry-run | --once | --backoff=* | --grace=* | --state=*) words+=("$1") ;;
    *) echo "local: $1: no such flag; wants [-n N] [--dry-run] [--once] [--backoff=S] [--grace=S] -- train …" >&2; exit 2 ;;
  esac
  shift
done
[[ "$count" =~ ^[1-9][0-9]*$ ]] || { echo "local: -n $count: wants a number of processes" >&2; exit 2; }
[ $# -gt 1 ] || { echo "local: wants -- train --config=… --workdir=…" >&2; exit 2; }
shift
exec "$python" "$root/launch/restart.py" --processes="$count" "${words[@]}" -- "$python" -m jaxlm "$@"
