#!/usr/bin/env bash
# jaxlm on one H100 or H200, in one command, in less than 8 minutes and with no network (docs/gpu.md):
#   benchmarks/gpu.sh [--dry-run] [--parts=attention,train,torch,plan,checkpoint] [--out=FOLDER]
# The machine has python3 (PYTHON) with jax for CUDA, flax, optax, orbax-checkpoint, torch and transformers. The little else that jaxlm
# imports comes as wheels in WHEELS, by default build/gpu_wheels, which `make gpu-wheels` fills. Results go to OUT, by default runs/gpu.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
wheels="${WHEELS:-$root/build/gpu_wheels}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check --target "$scratch/site" "$wheels"/*.whl
fi
export PYTHONPATH="$root:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" "$root/benchmarks/gpu.py" --out="${OUT:-$root/runs/gpu}" --workdir="$scratch/run" "$@"
