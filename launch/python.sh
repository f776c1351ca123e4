# shellcheck shell=bash
# Read by the launchers, which set $root: $python is the interpreter that PYTHON names, by default that of .venv, else python3, and
# finds jaxlm there.
python="${PYTHON:-$root/.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
  [ -z "${PYTHON:-}" ] || { echo "launch: PYTHON=$PYTHON: no such program" >&2; exit 2; }
  python=python3
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
