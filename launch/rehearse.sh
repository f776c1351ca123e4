#!/usr/bin/env bash
# The launch, config, mesh, restore and one step of a run, on CPU devices, before money is spent:
#   launch/rehearse.sh --topology=v5e:4x4 --config=configs/llama3.py:8b [--config.KEY=VALUE …] [--workdir=DIR] [--devices=K]
# PYTHON=… chooses the interpreter; by default that of .venv, else python3. Exit code: 0, or that of the phase that failed.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/python.sh
. "$root/launch/python.sh"
exec "$python" -m jaxlm.plan.rehearse "$@"
