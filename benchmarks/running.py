"""The command line, as benchmarks run it."""
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def jaxlm(*words: str) -> None:
  subprocess.run([sys.executable, '-m', 'jaxlm', *words], cwd=ROOT, check=True)
