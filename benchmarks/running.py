"""What every benchmark shares: its flags, its short mode, and how it starts the command line, a peer, or itself again.

    python benchmarks/NAME.py --short=FOLDER

is the same script cut to tiny models, one or two rounds and made-up data. It shows that the script still runs and that its table comes
out; the figures mean nothing. It writes to FOLDER, never to docs/, configs/ or runs/, and what is otherwise a process of its own runs in
this one, which has imported jax already. tests/test_benchmarks.py does it for each script here.
"""
import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import resource
import runpy
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What `jaxlm train` is told in short mode, of whatever model.
TINY_RUN = ('--config.batch=4', '--config.length=32', '--config.loss.chunks=1', '--config.optimizer.name=adamw', '--config.model.D=32',
            '--config.model.N=1')
# Of Llama-3, the step that all scripts that compile for a pod compile in short mode: the compiler takes seconds for it.
TINY_STEP = {
    'model.D': 128, 'model.H': 1, 'model.G': 1, 'model.K': 128, 'model.F': 128, 'model.N': 1, 'model.V': 256, 'model.remat': 'full',
    'batch': 8, 'length': 128, 'loss.chunks': 1, 'loss.over': 'vocabulary', 'optimizer.lr': 3e-4, 'mesh.data': 2, 'mesh.fsdp': 4}
TINY_POD = 'v5e:2x4'


def parser(doc: str, workdir: str = '', out: str = '') -> argparse.ArgumentParser:
  """The flags that every benchmark has, to which it adds its own. workdir, out: defaults, from the root of the repository, of --workdir,
  for runs and for results that are kept, and of --out, for its tables; without a default it has no such flag."""
  p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--short', type=pathlib.Path, metavar='FOLDER', help='tiny and quick, all of it in FOLDER: only to see that it runs')
  for name, default in (('workdir', workdir), ('out', out)):
    if default:
      p.add_argument(f'--{name}', type=pathlib.Path, default=ROOT / default)
  return p


def parse(p: argparse.ArgumentParser, **short) -> argparse.Namespace:
  """The flags on the command line. short: the defaults that flags have in short mode instead of their own."""
  flags = p.parse_args()
  if flags.short:
    p.set_defaults(**short)
    flags = p.parse_args()
    flags.short = flags.short.absolute()
    flags.workdir, flags.out = flags.short / 'runs', flags.short  # whatever --workdir and --out say: nothing of docs/ is overwritten
    flags.workdir.mkdir(parents=True, exist_ok=True)
  for name in {'workdir', 'out'} & set(vars(flags)):
    setattr(flags, name, getattr(flags, name).absolute())
  return flags


def jaxlm(flags: argparse.Namespace, *words: str) -> None:
  """Runs the command line in a process of its own; in short mode, in this one."""
  if flags.short:
    with _here():
      from jaxlm import cli  # pylint: disable=g-import-not-at-top
      cli.run(list(words))
  else:
    subprocess.run([sys.executable, '-m', 'jaxlm', *words], cwd=ROOT, check=True)


class Measured(NamedTuple):
  seconds: float
  peak: float  # the largest resident memory, GB; files that are mapped count
  out: str


def measured(flags: argparse.Namespace, *words: str) -> Measured:
  """`jaxlm WORDS`: how long it took, and how much memory; in short mode that of this process, whatever else it did."""
  began = time.time()
  if flags.short:
    with contextlib.redirect_stdout(io.StringIO()) as out:
      jaxlm(flags, *words)
    return Measured(time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, out.getvalue())
  # pylint: disable-next=consider-using-with
  child = subprocess.Popen([sys.executable, '-m', 'jaxlm', *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  out = child.stdout.read()
  _, status, usage = os.wait4(child.pid, 0)
  child.returncode = os.waitstatus_to_exitcode(status)
  if child.returncode:
    sys.exit(f'jaxlm {" ".join(words)} ended with {child.returncode}\n{out}')
  return Measured(time.time() - began, usage.ru_maxrss * 1024 / 1e9, out)


def again(flags: argparse.Namespace, script: str, *words: str) -> str:
  """What `python SCRIPT WORDS` prints, in a process of its own; in short mode, in this one."""
  if flags.short:
    return in_process(script, f'--short={flags.short}', *words)
  return subprocess.run([sys.executable, script, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def kept(flags: argparse.Namespace, file: pathlib.Path, script: str, *words: str) -> dict:
  """The JSON that `SCRIPT WORDS` prints as its last line (see `again`). It is kept in `file`, and not made again."""
  if not file.exists():
    print(f'{file.name} is not there yet: {" ".join(words)} …', flush=True)
    new = file.with_suffix('.new')
    new.write_text(again(flags, script, *words).splitlines()[-1], encoding='utf-8')
    new.rename(file)
  return json.loads(file.read_text(encoding='utf-8'))


def in_process(script: str, *words: str) -> str:
  """What `python SCRIPT WORDS` prints, run in this process. RuntimeError if it exits with another code than 0."""
  argv, sys.argv = sys.argv, [script, *words]
  try:
    with _here(), contextlib.redirect_stdout(io.StringIO()) as out:
      runpy.run_path(script, run_name='__main__')
  except SystemExit as e:
    if e.code:
      raise RuntimeError(f'{script} {" ".join(words)} exits with {e.code}\n{out.getvalue()}') from e
  finally:
    sys.argv = argv
  return out.getvalue()


@contextlib.contextmanager
def _here():
  """This process as one that was started at the root of the repository, and that jaxlm/memory.py need not start anew."""
  os.environ.setdefault('GLIBC_TUNABLES', '')
  with contextlib.chdir(ROOT):
    yield


def fetched(flags: argparse.Namespace, name: str, folder: pathlib.Path) -> str:
  """The SOURCE of texts that come in a package, in FOLDER/NAME.jsonl: fetched if they are not there yet; in short mode, made up."""
  file = folder / f'{name}.jsonl'
  if not file.exists() and flags.short:
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(map(json.dumps, map(MADE_UP[name], range(80)))), encoding='utf-8')
  elif not file.exists():
    jaxlm(flags, 'data', 'fetch', name, f'--out={folder}')
  return f'jsonl:{file}'


def _words(seed: int, count: int) -> str:
  words = 'the of market cat river model letter house seven green walks runs light stone'.split()
  return ' '.join(random.Random(seed).choices(words, k=count))


# Records with the fields of those of data/packages.py, by number.
MADE_UP = {
    'spam': lambda n: {'text': f'{_words(n, 12)} {"now free" if n % 2 else ""}', 'label': ('ham', 'spam')[n % 2]},
    'german': lambda n: {'de': _words(n, 4), 'en': _words(n, 4).upper()},
    'shakespeare': lambda n: {'name': str(n), 'text': _words(n, 40)},
}
