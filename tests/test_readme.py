"""Every shell and Python block of the README runs, in order, in a copy of the tree."""
import os
import pathlib
import re
import shutil
import shlex
import subprocess
import sys

import jax
import pytest

from jaxlm import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r'```(sh|python)\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """The files that git tracks or would, and the environment that runs these tests as .venv. The quickstart's text is that of this
  package: a tenth of what it reads otherwise (tests/test_data.py), which three runs would cut into tokens."""
  folder = tmp_path_factory.mktemp('readme')
  listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.split('\n')
  for name in filter(None, listed):
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)
  (folder / '.venv').symlink_to(sys.prefix)
  quickstart = (folder / 'configs/quickstart.py').read_text(encoding='utf-8')
  assert "source='stdlib'" in quickstart
  quickstart = quickstart.replace("source='stdlib'", "source='text:jaxlm/**/*.py'")
  (folder / 'configs/quickstart.py').write_text(quickstart, encoding='utf-8')
  return folder


def parts(text):
  """The lines of a shell block, in order: a command of jaxlm as its words, what is between as one text for bash. The train of
  runs/small, which most blocks read, is left to bash: a process of its own, as whatever make and the launchers start."""
  found = []
  for line in text.replace('\\\n', ' ').splitlines(keepends=True):
    if line.startswith('.venv/bin/jaxlm ') and not ('jaxlm train' in line and '--workdir=runs/small ' in line):
      found.append(shlex.split(line)[1:])
    elif found and isinstance(found[-1], str):
      found[-1] += line
    else:
      found.append(line)
  return found


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_block(tree, number, monkeypatch):
  """`make quickstart` is cut to a few steps of a smaller model, and `make test` to collecting a file, by the environment.
  Commands of jaxlm run in this process, which has imported what they want, on one device."""
  language, text = BLOCKS[number]
  env = {**os.environ, 'TESTS': 'tests/test_layout.py', 'FLAGS': '--config.steps=6 --config.model.N=1', 'EVAL_FLAGS': '--data=text:README.md',
         'PYTEST_ADDOPTS': '--collect-only', 'PYTHONPATH': str(tree)}
  monkeypatch.chdir(tree)
  monkeypatch.setenv('GLIBC_TUNABLES', '')  # else the command line begins this process anew
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *a: one)
  if language == 'python':
    exec(text, {})  # pylint: disable=exec-used
    return
  for part in parts(text):
    if not isinstance(part, str):
      cli.run(part)
      continue
    out = subprocess.run(['bash', '-euo', 'pipefail', '-c', part], env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
  if 'make quickstart' in text:
    for shown in ('trained to step 6', 'gzip -9', 'xz -9', 'byte 5-gram', 'this model', 'def read_config(path):'):
      assert shown in out.stdout
    assert (tree / 'runs/quickstart/eval.json').exists()


def test_the_table_of_places_is_true():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  links = re.findall(r'\]\(([^)]+)\)', text)
  assert len(links) > 20
  for link in links:
    assert (ROOT / link).exists(), link


def test_every_module_is_in_the_table_or_of_the_kind_that_need_not_be():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  unlisted = {'__init__', '__main__', 'metrics', 'report', 'signals', 'inspect', 'tokenizer'}
  for path in (ROOT / 'jaxlm').rglob('*.py'):
    assert path.stem in unlisted or f'{path.name}' in text, path
