"""Every shell and Python block of the README runs, in order, in a copy of the tree."""
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r'```(sh|python)\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  """The files that git tracks or would, and the environment that runs these tests as .venv."""
  folder = tmp_path_factory.mktemp('readme')
  listed = subprocess.run(['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.split('\n')
  for name in filter(None, listed):
    if (ROOT / name).exists():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, folder / name)
  (folder / '.venv').symlink_to(sys.prefix)
  return folder


@pytest.mark.parametrize('number', range(len(BLOCKS)))
def test_block(tree, number):
  """`make quickstart` is cut to a few steps of a smaller model, and `make test` to collecting a file, by the environment. The tokens that
  it writes serve the runs of the same data, which would write them again."""
  language, text = BLOCKS[number]
  for run in ('small', 'mesh'):
    if f'--workdir=runs/{run} ' in text and 'configs/quickstart.py' in text and (tree / 'runs/quickstart/data').exists():
      shutil.copytree(tree / 'runs/quickstart/data', tree / 'runs' / run / 'data', dirs_exist_ok=True)
  env = {**os.environ, 'TESTS': 'tests/test_layout.py', 'FLAGS': '--config.steps=6 --config.model.N=1', 'EVAL_FLAGS': '--data=text:README.md',
         'PYTEST_ADDOPTS': '--collect-only', 'PYTHONPATH': str(tree)}
  words = ['bash', '-euo', 'pipefail', '-c', text] if language == 'sh' else [sys.executable, '-c', text]
  out = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, check=False)
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
