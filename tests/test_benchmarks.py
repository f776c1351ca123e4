"""Every script of benchmarks/ runs in its short mode (benchmarks/running.py), and its table comes out. Of no figure is anything asked."""
import functools
import hashlib
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from jaxlm.plan import compile as compiling

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in (ROOT / 'benchmarks').glob('*.py')}
SCRIPTS = sorted(name for name, path in FILES.items() if "if __name__ == '__main__'" in path.read_text(encoding='utf-8'))
_compiled = functools.cache(compiling.step)  # of three scripts the same tiny step, which the TPU's compiler takes seconds for


@pytest.fixture
def short(tmp_path, monkeypatch):
  """name of a script, words → what it prints, on one device; and the folder that it writes to."""
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  import running  # pylint: disable=g-import-not-at-top
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *a: one)
  monkeypatch.setattr(compiling, 'step', lambda config, topology, slices=1: _compiled(config, topology, slices))
  return lambda name, *words: running.in_process(str(FILES[name]), f'--short={tmp_path}', *words)


@pytest.mark.parametrize('name', SCRIPTS)
def test_runs_in_short_mode(name, short, tmp_path):
  import time
  t = time.process_time(); import resource; c = resource.getrusage(resource.RUSAGE_CHILDREN)
  out = short(name)
  c2 = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(out)
  print('CPU', name, time.process_time() - t, c2.ru_utime - c.ru_utime)
  for f in tmp_path.glob('*.md'): print(f.read_text())
