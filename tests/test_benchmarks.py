"""Every script of benchmarks/ runs in its short mode (benchmarks/running.py), and its table comes out; of no figure is anything asked."""
import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxlm.errors import UsageError
from jaxlm.kernels import dense, on_mesh
from jaxlm.plan import compile as compiling

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in (ROOT / 'benchmarks').glob('*.py')}
SCRIPTS = sorted(name for name, path in FILES.items() if "if __name__ == '__main__'" in path.read_text(encoding='utf-8'))
# What a script prints; one that is not here writes a table.
SAYS = {
    'gpt2_step': r'tiny ratio of medians torch / jaxlm \d+\.\d+; .* 2 rounds',
    'import_memory': r'bfloat16: \d.* of safetensors .* × the largest tensor in float32',
    'minilm': r'5 vectors: the largest difference .*(\n.*)+2 texts ratio of medians',
    'ngram': r'3-grams over bytes: [\d,]+ tokens .*\n.* grams, .* bits a byte',
    'seal': r'stall of a save: .*\nseal, all files checked: .*\nrestore, .*\nfirst step after .* \(cold\)',
    'smollm2': r'nats a token on this.py: .*\n(.*\n)*greedy: 3 of 3 .*\n4 beams: 3 of 3 (.*\n)+batch 1 ratio of medians',
}
ROWS = {'faults': 1, 'gate': 1, 'pods': 1, 'planner': 30, 'gpu': 6}  # of all tables, at least; 2 where nothing is said
_compiled = functools.cache(compiling.step)  # three scripts compile the same tiny step, which takes the TPU's compiler seconds


@pytest.fixture
def benchmarks(monkeypatch):
  """As scripts see it: benchmarks/ is on the path, and there is one device."""
  monkeypatch.syspath_prepend(ROOT / 'benchmarks')
  one = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda *a: one)
  monkeypatch.setattr(compiling, 'step', lambda config, topology, slices=1: _compiled(config, topology, slices))


def run(name: str, folder: pathlib.Path, *words: str) -> str:
  """What a script prints in short mode."""
  import running  # pylint: disable=g-import-not-at-top
  return running.in_process(str(FILES[name]), f'--short={folder}', *words)


def rows_of(text: str) -> int:
  """Rows of all tables. Each has as many cells as its head, and no number that is none."""
  count = 0
  for table in re.findall(r'(?:^\|.*\|\n)+', text, re.M):
    head, line, *rows = table.splitlines()
    cells = head.count('|')
    assert re.fullmatch(r'\|(-+\|)+', line) and line.count('|') == cells
    for row in rows:
      assert row.count('|') == cells and not re.search(r'\b(nan|inf|None)\b', row), row
    count += len(rows)
  return count


def kept() -> dict:
  """What no short mode may touch."""
  paths = [path for folder in ('docs', 'configs') for path in (ROOT / folder).glob('*') if path.is_file()]
  return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize('name', SCRIPTS)
def test_runs_in_short_mode(name, benchmarks, tmp_path):
  before = kept()
  said = run(name, tmp_path)
  assert kept() == before
  if name in SAYS:
    assert re.search(SAYS[name], said), said
  elif name == 'recommend':
    (model, pods), = json.loads((tmp_path / 'pods.json').read_text()).items()
    assert model.endswith('.py:1.7b') and pods['v5e:16x16']['mesh.fsdp'] >= 1
  else:
    tables = [path.read_text(encoding='utf-8') for path in tmp_path.glob('*.md')]
    assert len(tables) == 1, f'benchmarks/{name}.py --short=FOLDER writes no table to FOLDER (benchmarks/running.py), and SAYS has nothing of it'
    assert rows_of(tables[0]) >= ROWS.get(name, 2), tables[0]


def test_what_is_no_script_is_imported_by_one():
  text = '\n'.join(path.read_text(encoding='utf-8') for path in FILES.values())
  for name in set(FILES) - set(SCRIPTS):
    assert re.search(rf'^\s*(import|from) {name}\b', text, re.M), f'benchmarks/{name}.py is run by nothing'


def test_a_race_takes_workers_in_turn_and_says_why_one_died(benchmarks, tmp_path):
  """As scripts do it when they are not short: each worker is a process."""
  import interleaved  # pylint: disable=g-import-not-at-top
  script = tmp_path / 'script.py'
  script.write_text('import os, sys, interleaved\n'
                    'if "--worker=b" in sys.argv and "--batch=3" in sys.argv: sys.exit("out of luck")\n'
                    'interleaved.serve(lambda: [sys.argv[1:], os.environ.get("MINE")])\n')
  env = {'PYTHONPATH': str(ROOT / 'benchmarks')}
  race = functools.partial(interleaved.race, argparse.Namespace(short=None), str(script), {'a': None, 'b': None}, 2)
  out = race({'a': {**env, 'MINE': 'x'}, 'b': env}, batch=2)
  assert {name: [result for _, result in rounds] for name, rounds in out.items()} == {
      'a': [[['--batch=2', '--worker=a'], 'x']] * 2, 'b': [[['--batch=2', '--worker=b'], None]] * 2}
  with pytest.raises(RuntimeError, match=r'(?s)the b worker ended with 1.*out of luck'):
    race({'a': env, 'b': env}, batch=3)


@pytest.mark.parametrize('case, wrong', [('causal', {'causal': False}), ('window', {'window': 19})])
def test_attention_that_sees_other_keys_is_found(case, wrong, benchmarks, monkeypatch):
  """The window of a dry run is 18 keys: one more is enough."""
  import gpu_parts  # pylint: disable=g-import-not-at-top
  monkeypatch.setitem(on_mesh.ATTENTION, 'dot_product', lambda how, *arrays: dense.plain(dataclasses.replace(how, **wrong), *arrays))
  monkeypatch.setattr(gpu_parts, 'SHORT', {case: gpu_parts.CASES[case]})
  with pytest.raises(SystemExit, match=f'attention by dot_product is not that of plain: {case}'):
    list(gpu_parts.attention(argparse.Namespace(dry_run=True)))


def test_a_hash_of_a_state_is_of_each_bit(benchmarks):
  import gpu_parts  # pylint: disable=g-import-not-at-top
  a = np.arange(6, dtype=np.float32).reshape(2, 3)
  changed = a.copy()
  changed.view(np.uint32)[1, 2] ^= 1
  of = lambda a: gpu_parts.hashes({'params': {'w': a}, 'step': np.int32(3)})
  assert of(a) == of(a.copy()) and list(of(a)) == ['params/w', 'step']
  assert of(a)['params/w'] != of(changed)['params/w'] and of(a)['step'] == of(changed)['step']


def test_a_part_that_fails_or_hangs_takes_no_other_with_it(benchmarks, tmp_path, monkeypatch):
  import gpu  # pylint: disable=g-import-not-at-top
  script = tmp_path / 'parts.py'
  script.write_text('import sys, time\nif "--part=train" in sys.argv: sys.exit("no luck")\n'
                    'if "--part=torch" in sys.argv: time.sleep(60)\n')
  monkeypatch.setattr(gpu, '__file__', str(script))
  monkeypatch.setattr(gpu, 'run', lambda flags, part, seconds, of=gpu.run: of(flags, part, .5 if part == 'torch' else seconds))
  monkeypatch.setattr(sys, 'argv', ['gpu.py', '--dry-run', '--parts=train,torch,plan', f'--out={tmp_path}', f'--workdir={tmp_path}/run'])
  with pytest.raises(SystemExit) as e:
    gpu.main()
  assert e.value.code == 1
  assert json.loads((tmp_path / 'gpu.json').read_text())['failed'] == {'train': 'exit code 1', 'torch': 'not done after 0.5 s'}
  assert '- torch failed: not done after 0.5 s' in (tmp_path / 'gpu.md').read_text()


LACKING = ('gguf', 'grain', 'tensorboardX', 'tensorflow_datasets', 'importlib_resources')


def test_the_command_for_a_gpu_wants_no_package_that_its_machine_lacks(tmp_path):
  """benchmarks/gpu.sh, as a shell starts it, with one part; and what the other parts import."""
  for name in LACKING:
    (tmp_path / f'{name}.py').write_text(f'raise ImportError("{name} is not on the machine")\n')
  env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'PYTHON': sys.executable, 'OUT': str(tmp_path / 'out'), 'WHEELS': str(tmp_path)}
  words = [ROOT / 'benchmarks/gpu.sh', '--dry-run', '--parts=plan']
  out = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  assert 'plan: h100:1x1: ' in out.stdout and set(json.loads((tmp_path / 'out/gpu.json').read_text())) >= {'device', 'plan'}
  imports = 'import jaxlm.train, jaxlm.lm, jaxlm.generate, jaxlm.checkpoint, jaxlm.kernels.cudnn, orbax.checkpoint'
  subprocess.run([sys.executable, '-c', imports], env={**env, 'PYTHONPATH': f'{tmp_path}:{ROOT}'}, check=True)
  makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
  assert re.search(r'--dest build/gpu_wheels ml-collections$', makefile, re.M)


def test_without_a_gpu_the_command_says_so(benchmarks, tmp_path, monkeypatch):
  import gpu  # pylint: disable=g-import-not-at-top
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UsageError, match='no nvidia-smi, so no GPU here; --dry-run does all of it on the CPU'):
    gpu.device_of(argparse.Namespace(dry_run=False))
  for name, kind in (('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H200', 'h200')):
    (tmp_path / 'nvidia-smi').write_text(f'#!/bin/sh\necho {name}\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    assert gpu.device_of(argparse.Namespace(dry_run=False)) == (name, kind)


def test_the_page_on_the_gpu_has_the_tables_that_the_command_writes(benchmarks):
  import gpu  # pylint: disable=g-import-not-at-top
  text = (ROOT / 'docs/gpu.md').read_text(encoding='utf-8')
  assert all('\n'.join(table) in text for table in (gpu.TABLE, gpu.ERRORS))
