#!/usr/bin/env bash
# jaxlm on one H100 or H200, in one command, in less than 8 minutes and with no network: benchmarks/gpu.py says what it does.
#   benchmarks/gpu.sh [--dry-run] [--parts=attention,train,torch,plan,checkpoint] [--out=FOLDER]
# The machine has python3 with jax for CUDA, flax, optax, orbax-checkpoint, torch and transformers; the little else that jaxlm imports
# comes as wheels in WHEELS (build/gpu_wheels, by `make gpu-wheels`). Results go to $OUT, by default runs/gpu. PYTHON=… chooses the interpreter.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="${WHEELS:-$root/build/gpu_wheels}"
out="${OUT:-$root/runs/gpu}"
python="${PYTHON:-python3}"
if compgen -G "$wheels/*.whl" >/dev/null; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" "$root/benchmarks/gpu.py" --out="$out" --workdir="$(mktemp -d)/run" "$@"
